"""What the load benchmark and the soak make of what they saw; no speed is judged here."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from research.qwen.text.tokenizer import QwenTokenizer
from scripts.bench_serve import PLAIN_TOKENS, TARGETS, judge, made_vocabulary, start_peer, text_of
from scripts.bench_serve_client import Stream, gaps
from scripts.bench_serve_peer import groups
from scripts.bench_serve_process import Figures
from scripts.bench_serve_requests import Answer, malformed, wishes
from scripts.bench_serve_soak import Found, Soak, grown, in_envelope


@pytest.mark.slow
def test_the_made_vocabulary_is_as_large_as_the_published_one(tmp_path: Path) -> None:
    tokenizer = QwenTokenizer(made_vocabulary(tmp_path))
    assert tokenizer.eod_id == PLAIN_TOKENS
    assert tokenizer.decode(tokenizer.encode("wörter und 你好")) == "wörter und 你好"


def test_gaps_reach_into_the_time_that_is_looked_at() -> None:
    times = [0.0, 1.0, 2.0, 5.0, 6.0, 7.0]
    assert gaps(times, 2.5, 5.5) == [3.0, 1.0]
    assert gaps(times, 8.0, 9.0) == []


def test_prompts_of_a_batch_share_passes() -> None:
    assert groups([[1] * 200, [1] * 300, [1] * 20, [1] * 512]) == [[0, 1], [2], [3]]
    with pytest.raises(SystemExit, match="513 tokens does not fit"):
        groups([[1] * 513])


def test_targets_are_judged_by_the_median_of_the_rounds() -> None:
    rounds = {
        "clients": [{"over_sequential": v} for v in (2.0, 3.5, 9.0)],
        "shared_prompt": [{"second_over_first": v} for v in (0.1, 0.3, 0.4)],
    }
    more, less = judge(rounds)
    assert (more["median"], more["range"], more["passed"]) == (3.5, [2.0, 9.0], True)
    assert (less["median"], less["rounds"], less["passed"]) == (0.3, 3, False)


def test_the_table_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes: list[str] = []
    assert start_peer(tmp_path / "q4_0.gguf", 2, notes) is None
    rounds = {"clients": [{"over_sequential": 2.0}]}
    about = {"cpu": "a processor", "cores": 2, "memory_gib": 1.5}
    result = {"title": "x", "machine": about, "date": "d", "rounds": rounds, "notes": notes}
    text = text_of({**result, "targets": judge(rounds)})
    assert "| 2.00 | 2.00 - 2.00 | 1 | FAIL |" in text
    assert text.endswith("llama.cpp: not installed")
    assert len({target.figure for target in TARGETS}) == len(TARGETS)


def streamed(*events: object) -> list[int]:
    """Ids of a stream with these events, read over a transport without a network."""
    body = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)

    async def read() -> list[int]:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            stream = await Stream(client, [1], 4, "").read()
            assert len(stream.times) == len(stream.ids) and stream.first > 0
            return stream.ids

    return asyncio.run(read())


def test_a_stream_counts_tokens() -> None:
    chunk = {"choices": [{"token_ids": [5, 6]}]}
    assert streamed({"choices": [{"token_ids": []}]}, chunk, chunk, "[DONE]") == [5, 6, 5, 6]
    with pytest.raises(RuntimeError, match="ended with"):
        streamed(chunk)
    with pytest.raises(RuntimeError, match="broken"):
        streamed(chunk, {"error": {"message": "broken"}})


def test_streamed_and_whole_answers_are_compared_by_what_they_say() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": "hello", "tool_calls": [call]}
    whole, pieces = Answer(), Answer()
    whole.take({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    for delta in (
        {"role": "assistant", "content": "hel"},
        {"content": "lo"},
        {"tool_calls": [{"index": 0, "id": "b", "function": {"name": "f", "arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ):
        pieces.take({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    assert pieces != whole
    pieces.take({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    assert pieces == whole
    whole.take({"choices": [{"index": 1, "message": {"content": ""}, "finish_reason": "length"}]})
    assert pieces != whole


def figures(**values: list[float]) -> list[Figures]:
    """Looks at an idle server."""
    rows = {"mib": [500.0] * 8, "threads": [30.0] * 8, "files": [15.0] * 8} | values
    return [Figures(*row) for row in zip(*rows.values(), strict=True)]


def test_what_grows_is_a_problem() -> None:
    up = [float(value) for value in range(10, 18)]
    assert grown(figures()) == []
    assert grown(figures(threads=[20.0, 30.0, 40.0, 20.0, 30.0, 40.0, 30.0, 35.0])) == []
    assert len(grown(figures(files=up, threads=[5 * value for value in up]))) == 2
    assert "mib grew" in grown(figures(mib=[500.0 + 5 * i for i in range(8)]))[0]


def test_refusals_have_the_envelope() -> None:
    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    assert in_envelope(httpx.Response(400, json={"error": error}))
    assert not in_envelope(httpx.Response(400, json={"error": {"message": "no"}}))
    assert not in_envelope(httpx.Response(400, json={"detail": "no"}))
    assert not in_envelope(httpx.Response(400, text="no"))


def test_a_wrong_answer_and_a_failure_are_found() -> None:
    server: Any = SimpleNamespace(url="http://server")
    soak = Soak(server, 10, 0)
    right = Answer()
    right.take({"choices": [{"index": 0, "text": "right", "finish_reason": "stop"}]})
    soak.alone = [right] * len(soak.wishes)

    async def ask(status: int, text: str) -> Found:
        body = {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
        transport = httpx.MockTransport(lambda request: httpx.Response(status, json=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await soak._compared(client, 0, stream=False)
        return soak.found

    assert not asyncio.run(ask(200, "right")).problems
    assert "beside others" in asyncio.run(ask(200, "wrong")).problems[-1]
    assert "status 500" in asyncio.run(ask(500, "right")).problems[-1]
    asyncio.run(ask(200, "right"))
    assert len(soak.found.problems) == 2


def test_there_are_many_kinds_of_requests() -> None:
    bodies = [wish.body for wish in wishes()]
    assert len({json.dumps(body, sort_keys=True) for body in bodies}) == len(bodies) > 30
    for key in ("tools", "response_format", "seed", "logprobs", "stop", "n"):
        assert any(key in body for body in bodies)
    assert len(malformed()) > 25
