"""A full queue, a server that shuts down, base models, and many clients at once."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import threading

import httpx
import pytest

from research.qwen.serve.state import ServerSettings
from tests.serve.scripted import Script, scripted_server
from tests.serve.test_stream import eventually

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_429_with_a_time_to_come_back(stream: bool) -> None:
    with scripted_server("hello", max_queue=1) as script, concurrent.futures.ThreadPoolExecutor(4) as pool:
        script.lm.free_steps = script.lm.steps + 1
        script.lm.gate = gate = threading.Event()
        stats = script.state.scheduler.stats
        try:
            first = pool.submit(script.chat)
            eventually(lambda: stats().running == 1)
            second = pool.submit(script.complete)
            eventually(lambda: stats().waiting == 1)
            for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": ["a", "b"]})):
                response = script.client.post(path, json={**body, "stream": stream})
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
        finally:
            gate.set()
        assert first.result()["choices"] and second.result()["choices"]
        eventually(lambda: stats().running == stats().waiting == 0)


def test_a_stream_that_outlives_the_grace_time_ends_with_an_error_event() -> None:
    settings = ServerSettings(ping_seconds=0.05)
    with scripted_server("word " * 90, settings) as script:
        script.lm.gate = threading.Event()
        with script.client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            drained = concurrent.futures.Future[bool]()
            drain = threading.Thread(target=lambda: drained.set_result(script.state.scheduler.drain(0.05)))
            drain.start()
            eventually(lambda: script.state.phase == "draining")
            refused = httpx.post(f"{script.client.base_url}{CHAT}", json={"messages": HI})
            script.lm.gate.set()
            events = [line for line in lines if line.startswith("data: ")]
        drain.join()
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert not drained.result()
    assert set(json.loads(events[-1].removeprefix("data: "))) == {"error"}


@pytest.mark.parametrize(
    ("chat_format", "ends"),
    [("chatml", {"<|im_end|>", "<|im_start|>", "<|endoftext|>"}), ("raw", {"<|endoftext|>"})],
)
def test_ids_that_end_an_answer(chat_format: str, ends: set[str]) -> None:
    with scripted_server("ok", generation={"chat_format": chat_format}) as script:
        for name in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"):
            script.lm.end = script.lm.tokenizer.control_id(name)
            choice = script.complete(max_tokens=5)["choices"][0]
            assert choice["finish_reason"] == ("stop" if name in ends else "length")
            assert choice["text"] == "ok", "control tokens do not show"


def test_many_clients_get_the_answers_they_asked_for() -> None:
    def upper(prompt: str) -> str:
        return prompt.rpartition("user\n")[2].split("<|im_end|>")[0].upper()

    def ask(script: Script, number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"question {number} 你🙂"}]}
        if number % 2:
            text = script.post(CHAT, body)["choices"][0]["message"]["content"]
        else:
            deltas = [chunk["choices"][0]["delta"] for chunk in script.events(CHAT, body)]
            text = "".join(delta.get("content", "") for delta in deltas)
        assert text == f"QUESTION {number} 你🙂"

    with scripted_server(upper) as script, concurrent.futures.ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(ask, script, number) for number in range(60)]:
            future.result()


def test_the_log_has_counts_and_reasons_but_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), scripted_server("the secret answer") as script:
        script.chat(messages=[{"role": "user", "content": "the secret question"}])
        script.chat_events(stop=["answer"])
        eventually(lambda: sum("completion_tokens" in str(vars(record)) for record in caplog.records) >= 2)
        lines = [str(vars(record)) for record in caplog.records]
    told = [line for line in lines if "completion_tokens" in line]
    assert all("finish_reason" in line and "stop" in line for line in told)
    assert not [line for line in lines if "secret" in line]
