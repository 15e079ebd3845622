"""Streams: the events of both routes, whole characters, usage, pings, errors on the way, clients that leave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from research.qwen.serve.state import ServerSettings
from tests.serve.scripted import Script, scripted_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TEXT = "Hello, 你好 🙂👩‍💻 龘!"


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello", ServerSettings(ping_seconds=0.05)) as script:
        yield script


@pytest.fixture(autouse=True)
def _fresh(server: Script) -> Iterator[None]:
    server.fresh(TEXT)
    yield
    eventually(lambda: server.state.scheduler.stats().running == 0)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that other threads are about to do."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.002)


def first_choices(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0] for chunk in chunks]


def test_chat_chunks_have_the_order_of_openai(server: Script) -> None:
    chunks = server.chat_events()
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for field in ("id", "created", "model", "system_fingerprint"):
        assert len({chunk[field] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = first_choices(chunks)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    middle = choices[1:-1]
    assert all(list(choice["delta"]) == ["content"] and choice["delta"]["content"] for choice in middle)
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert "".join(choice["delta"]["content"] for choice in middle) == TEXT


def test_completion_chunks(server: Script) -> None:
    chunks = server.events(COMPLETIONS, {"prompt": "hi", "max_tokens": 100})
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    choices = first_choices(chunks)
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_headers_switch_buffering_off(server: Script) -> None:
    with server.client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        raw = b"".join(response.iter_raw())
    assert raw.endswith(b"\n\ndata: [DONE]\n\n")


def test_no_character_is_ever_split(server: Script) -> None:
    """The demo vocabulary has neither emoji joiners nor rare characters: these come as several tokens."""
    tokenizer = server.lm.tokenizer
    assert any(
        tokenizer.token_bytes(i)[:1] == b"\xf0" and len(tokenizer.token_bytes(i)) < 4
        for i in tokenizer.encode("👩‍💻")
    )
    for chunks in (server.chat_events(), server.events(COMPLETIONS, {"prompt": "x", "max_tokens": 100})):
        assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)


def test_an_unfinished_character_comes_at_the_end(server: Script) -> None:
    ids = server.lm.tokenizer.encode("龘")
    server.lm.reply = "龘"
    assert len(ids) > 1
    choices = first_choices(server.chat_events(max_tokens=len(ids) - 1))
    assert [choice["delta"].get("content") for choice in choices] == ["", "\ufffd", None]
    assert choices[-1]["finish_reason"] == "length"


def test_stop_words_are_held_back(server: Script) -> None:
    server.lm.reply = "one END two EN three"
    choices = first_choices(server.chat_events(stop=["END"]))
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "one "
    choices = first_choices(server.chat_events(stop=["ENDE"]))
    assert "".join(choice["delta"].get("content", "") for choice in choices) == server.lm.reply


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_in_a_last_chunk_on_request(server: Script, path: str) -> None:
    body = {"messages": HI} if path == CHAT else {"prompt": "hi", "max_tokens": 100}
    chunks = server.events(path, {**body, "stream_options": {"include_usage": True}})
    *others, last = chunks
    assert last["choices"] == [] and last["id"] == others[0]["id"]
    assert all(chunk["usage"] is None for chunk in others)
    ids, _ = server.asked[0]
    assert last["usage"]["prompt_tokens"] == len(ids)
    assert last["usage"]["completion_tokens"] == len(server.lm.tokenizer.encode(TEXT)) + 1
    whole = server.post(path, body)["usage"]
    assert {**whole, "prompt_tokens_details": None} == {**last["usage"], "prompt_tokens_details": None}


def test_usage_in_every_chunk(server: Script) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.chat_events(stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] <= 1 and counts[-1] == counts[-2] > 1


def test_options_may_be_empty(server: Script) -> None:
    assert all("usage" not in chunk for chunk in server.chat_events(stream_options={}))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_several_choices_interleave(server: Script, path: str) -> None:
    body = {"messages": HI, "n": 3} if path == CHAT else {"prompt": ["hi", "ho"], "n": 2, "max_tokens": 100}
    texts: dict[int, str] = {}
    ends: list[int] = []
    for chunk in server.events(path, body):
        [choice] = chunk["choices"]
        text = choice["delta"].get("content", "") if path == CHAT else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + text
        ends += [choice["index"]] if choice["finish_reason"] else []
    count = 3 if path == CHAT else 4
    assert texts == dict.fromkeys(range(count), TEXT) and sorted(ends) == list(range(count))


def test_streamed_pieces_equal_the_whole(server: Script) -> None:
    whole = server.chat(logprobs=True, top_logprobs=2, return_token_ids=True)["choices"][0]
    chunks = server.chat_events(logprobs=True, top_logprobs=2, return_token_ids=True)
    choices = first_choices(chunks)
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]
    assert [i for choice in choices for i in choice.get("token_ids") or ()] == whole["token_ids"]
    assert chunks[0]["prompt_token_ids"] == server.asked[0][0]


def test_comments_keep_a_silent_stream_open(server: Script) -> None:
    server.lm.gate = threading.Event()
    with server.client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line)
        server.lm.gate.set()
        rest = [line for line in lines if line]
    assert first == ": ping"
    assert rest[-1] == "data: [DONE]"


def test_an_error_on_the_way_is_the_last_event(server: Script) -> None:
    server.lm.fail_at = server.lm.steps + 3
    with server.client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data")]
    server.lm.fail_at = None
    last = json.loads(lines[-1].removeprefix("data: "))
    assert set(last) == {"error"} and set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in lines[-1] and len(lines) > 1
    assert server.chat()["choices"][0]["message"]["content"] == TEXT, "the server goes on"


def test_an_error_of_a_whole_answer_is_a_500_without_internals(server: Script) -> None:
    server.lm.fail_at = server.lm.steps + 3
    response = server.client.post(CHAT, json={"messages": HI})
    server.lm.fail_at = None
    assert response.status_code == 500 and "secret" not in response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_frees_its_cache_within_a_step(server: Script, path: str, stream: bool) -> None:
    stats = server.state.scheduler.stats
    server.lm.reply = "word " * 90
    body: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": ["hi", "ho"], "max_tokens": 400}
    server.lm.gate = gate = threading.Event()
    before, requests = stats().finished.get("cancelled", 0), 1 if path == CHAT else 2
    _ask_and_leave(server, path, {**body, "stream": stream})
    eventually(lambda: len(server.asked) == requests)
    time.sleep(0.05)  # until the server has seen it; the model is still in its pass
    step = server.lm.steps
    gate.set()
    eventually(lambda: stats().finished.get("cancelled", 0) == before + requests)
    eventually(lambda: stats().blocks_used == 0)
    assert server.lm.steps <= step + 1


def _ask_and_leave(server: Script, path: str, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=server.client.base_url, timeout=0.3) as leaving:
        if body["stream"]:
            with leaving.stream("POST", path, json=body) as response:
                next(response.iter_raw())  # a ping
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(path, json=body)
