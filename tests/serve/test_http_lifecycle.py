"""Start and end of the server as a process: loading, readiness, draining, grace, a second signal, failures."""

from __future__ import annotations

import gc
import json

import httpx
import pytest

from research.qwen.errors import ConfigError
from research.qwen.serve.lifecycle import listen, settle
from tests.serve.processes import INT, TERM, ServerProcess, Streaming, server_process

pytestmark = pytest.mark.slow

FAKE = "tests.serve.fake_server"


def logged(server: ServerProcess) -> list[dict[str, object]]:
    """The log: every line on standard error but those for people."""
    return [json.loads(line) for line in server.lines if line.startswith("{")]


def test_running_streams_finish_and_new_requests_are_refused() -> None:
    with server_process(FAKE, FAKE_STEP="0.01") as server:
        stream = Streaming(server.ready(), 40)
        server.send(TERM)
        server.until("no new requests")
        with httpx.Client(base_url=server.url) as client:  # while the stream runs, the server still answers
            refused = client.post("/v1/completions", json={"prompt": "a"})
            health = client.get("/health")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        stream.wait()
        assert server.exit_code() == 0
    assert stream.broken is None
    assert stream.events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in stream.events[-2]
    assert any(str(line["event"]).startswith("drained after") for line in logged(server))
    assert not server.lines[-1].startswith("Traceback")


def test_what_is_not_done_in_time_ends_with_an_error_event() -> None:
    with server_process(FAKE, "--grace", "0.2", FAKE_STEP="0.02") as server:
        streams = [Streaming(server.ready(), 3000) for _ in range(2)]
        server.send(INT)
        for stream in streams:
            stream.wait()
        assert server.exit_code() == 0
    for stream in streams:
        assert stream.broken is None, "the last event came whole"
        error = json.loads(stream.events[-1].removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"
        assert "shutting down" in error["message"]


def test_a_second_signal_ends_at_once() -> None:
    with server_process(FAKE, "--grace", "60", FAKE_STEP="0.02") as server:
        stream = Streaming(server.ready(), 3000)
        server.send(TERM)
        server.until("no new requests")
        server.send(TERM)
        assert server.exit_code() == 128 + TERM
        stream.wait()
    assert stream.events[-1] != "data: [DONE]"


def test_health_answers_while_the_model_loads_and_a_signal_ends_that() -> None:
    with server_process(FAKE, FAKE_LOAD="30") as server:
        answer = httpx.get(f"{server.url}/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert httpx.get(f"{server.url}/").status_code == 200
        server.send(TERM)
        assert server.exit_code(10) == 0
    assert not [line for line in server.lines if line.startswith("ready")]


def test_a_model_that_cannot_be_loaded() -> None:
    with server_process(FAKE, FAKE_FAIL="load", FAKE_LOAD="0.1") as server:
        assert server.exit_code() == 2
    assert server.lines[-1] == "error: the checkpoint is broken; get another"


def test_a_model_that_fails_at_work_ends_the_process() -> None:
    with server_process(FAKE, FAKE_FAIL="steps") as server:
        stream = Streaming(server.ready(), 3000)
        stream.wait()
        assert '"error"' in stream.events[-1]
        for _ in range(2):  # the scheduler gives up after several passes in a row
            if server.process.poll() is None:
                try:
                    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
                except httpx.HTTPError:
                    break
        assert server.exit_code() == 2
    assert server.lines[-1].startswith("error: the model has failed")


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot listen on 127.0.0.1 port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on no.such.host.invalid"):
        listen("no.such.host.invalid", 0)


def test_what_lives_as_long_as_the_server_is_not_looked_at_again() -> None:
    try:
        settle()
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
