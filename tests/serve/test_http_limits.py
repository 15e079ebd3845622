"""Limits: bodies too large or too slow, prompts too long, too many requests, a server that is not ready."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.errors import ClosedError, RequestError
from research.qwen.serve.app import create_app
from research.qwen.serve.errors import ApiError
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import error_of, fake_client, fake_engine, running_state, serve_app

pytestmark = pytest.mark.slow

LIMIT = 2000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    """A server that takes small bodies only."""
    with fake_client(ServerSettings(max_body=LIMIT, body_seconds=0.3, max_inputs=3)) as client:
        yield client


def body_of(size: int) -> bytes:
    """A valid embedding request of so many bytes."""
    empty = json.dumps({"input": "a", "user": ""})
    return json.dumps({"input": "a", "user": "u" * (size - len(empty))}).encode()


def pieces(body: bytes) -> Iterator[bytes]:
    """The body in parts: it is sent without a length then."""
    for start in range(0, len(body), 700):
        yield body[start : start + 700]


@pytest.mark.parametrize("chunked", [False, True])
def test_the_size_of_a_body(small: httpx.Client, chunked: bool) -> None:
    def send(size: int) -> httpx.Response:
        body = body_of(size)
        assert len(body) == size
        return small.post("/v1/embeddings", content=pieces(body) if chunked else body, headers=JSON)

    assert send(LIMIT).status_code == 200
    for size in (LIMIT + 1, 3 * LIMIT):
        response = send(size)
        error = error_of(response, 413)
        assert error["code"] == "body_too_large"
        assert str(LIMIT) in error["message"]
        assert response.headers["connection"] == "close"
    assert send(LIMIT).status_code == 200, "the server goes on"


def connect(client: httpx.Client, head: str) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection


def test_a_huge_length_is_refused_at_once(small: httpx.Client) -> None:
    head = "POST /v1/embeddings HTTP/1.1\nHost: a\nContent-Length: 99999999999\n\n"
    with connect(small, head) as connection:
        connection.settimeout(1)
        assert connection.recv(100).startswith(b"HTTP/1.1 413"), "before any of the body has come"


def test_a_body_that_does_not_come(small: httpx.Client) -> None:
    head = "POST /v1/embeddings HTTP/1.1\nHost: a\nContent-Length: 50\n\n{"
    with connect(small, head) as connection:
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"x-should-retry: false" in answer.lower()
        while answer:  # until the server closes the connection
            answer = connection.recv(1000)


def test_a_client_that_leaves_in_the_middle_of_its_body(small: httpx.Client) -> None:
    for _ in range(5):
        connect(small, "POST /v1/embeddings HTTP/1.1\nHost: a\nContent-Length: 50\n\n{").close()
    assert small.get("/health").status_code == 200


def test_routes_without_a_body_are_not_held_up(small: httpx.Client) -> None:
    assert small.post("/v1/embeddings").status_code == 400
    assert small.request("GET", "/health", content=b"x" * (LIMIT + 1)).status_code == 413


def test_the_number_of_inputs(small: httpx.Client) -> None:
    assert small.post("/v1/embeddings", json={"input": ["a"] * 3}).status_code == 200
    error = error_of(small.post("/v1/embeddings", json={"input": ["a"] * 4}), 400)
    assert error["param"] == "input" and "4" in error["message"] and "3" in error["message"]


def test_the_context() -> None:
    state = ServerState(ServerSettings(), fake_engine(max_length=64))
    assert state.check_context(60) == 4
    assert state.check_context(60, 4) == 4
    assert state.check_context(64, 0) == 0
    for prompt, new in ((64, None), (60, 5), (65, 0)):
        with pytest.raises(ApiError) as caught:
            state.check_context(prompt, new, param="messages")
        assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")
        assert caught.value.param == "messages"
        assert "64" in caught.value.message and str(prompt) in caught.value.message


def test_a_long_input_over_http(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/embeddings", json={"input": ["a", [1] * 513]}), 400)
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
    assert client.post("/v1/embeddings", json={"input": [1] * 512}).status_code == 200


class Blocked:
    """A scheduler whose model thread stands still until ``go``."""

    def __init__(self, state: ServerState):
        self.go, self.standing = threading.Event(), threading.Event()

        def wait(_: Any) -> None:
            self.standing.set()
            assert self.go.wait(20)

        state.scheduler.call(wait)
        assert self.standing.wait(20)


def test_a_full_queue_asks_to_come_again() -> None:
    with running_state(fake_engine(), max_queue=1) as state, serve_app(create_app(state)) as url:
        blocked = Blocked(state)
        state.submit([1, 2], SamplingParams(max_new_tokens=1), lambda _: None)
        try:
            response = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        finally:
            blocked.go.set()
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-should-retry"] == "true"
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_too_many_embedding_requests() -> None:
    settings = ServerSettings(max_pending_embeddings=1)
    with running_state(fake_engine(), settings) as state, serve_app(create_app(state)) as url:
        with state.embedding_slot():
            response = httpx.post(f"{url}/v1/embeddings", json={"input": "a"})
        assert error_of(response, 429)["code"] == "queue_full"
        for bad in ("", "a", "a"):  # a refused one gives its place back, too
            response = httpx.post(f"{url}/v1/embeddings", json={"input": bad})
        assert response.status_code == 200


GENERATING = ("/v1/embeddings", {"input": "a"}), ("/v1/completions", {"prompt": "a"})


def check_refused(url: str, phase: str) -> None:
    response = httpx.get(f"{url}/health")
    assert (response.status_code, response.json()["status"]) == (503, phase)
    assert response.headers["retry-after"]
    for path, body in GENERATING:
        response = httpx.post(url + path, json=body)
        assert error_of(response, 503)["type"] == "service_unavailable_error"
        assert response.headers["retry-after"] and response.headers["x-should-retry"] == "true"


def test_while_the_model_loads() -> None:
    state = ServerState(ServerSettings())
    with serve_app(create_app(state)) as url:
        check_refused(url, "loading")
        error_of(httpx.post(f"{url}/tokenize", json={"prompt": "a"}), 503)
        error_of(httpx.get(f"{url}/tokenizer_info"), 503)
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] is None
        assert httpx.get(f"{url}/metrics").status_code == 200
        with running_state(fake_engine()) as other:
            state.attach(other.engine, other.scheduler)
            assert httpx.get(f"{url}/health").status_code == 200
            state.begin_drain()
            check_refused(url, "draining")
            state.fail(RequestError("no"))
            check_refused(url, "failed")


def test_after_the_scheduler_has_closed() -> None:
    with running_state(fake_engine()) as state, serve_app(create_app(state)) as url:
        state.scheduler.close()
        check_refused(url, "closed")
        with pytest.raises(ClosedError, match="shut down"):
            state.check_ready()
