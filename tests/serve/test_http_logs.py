"""Request ids and log lines: one line a request, and never text of a user in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from research.qwen.serve import logs
from research.qwen.serve.app import create_app
from tests.serve.running import fake_engine, running_state, serve_app

SECRET = "Kirschkuchen"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What ``configure`` makes the process log; the loggers are put back afterwards."""
    names = ("", "research.qwen", "uvicorn.error")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    handlers = logging.getLogger().handlers[:]
    stream = io.StringIO()
    logs.configure("debug", stream)
    yield stream
    logging.getLogger().handlers[:] = handlers
    for logger, level in before:
        logger.setLevel(level)


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_ids_come_back(client: httpx.Client) -> None:
    assert (
        client.get("/version", headers={"x-request-id": "abc-1.2_3:4"}).headers["x-request-id"]
        == "abc-1.2_3:4"
    )
    made = {client.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for path in ("/nothing", "/health", "/"):
        assert client.get(path, headers={"x-request-id": "mine"}).headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("hostile", ["a b", "x" * 129, '{"a":1}', "é", ""])
def test_ids_that_do_not_belong_into_a_log(client: httpx.Client, hostile: str) -> None:
    answer = client.get("/version", headers={"x-request-id": hostile.encode()})
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.slow
def test_a_line_for_each_request(lines: io.StringIO) -> None:
    with running_state(fake_engine()) as state, serve_app(create_app(state)) as url:
        ids = {"x-request-id": "r1"}
        httpx.post(f"{url}/v1/embeddings", json={"input": SECRET, "user": SECRET}, headers=ids)
        httpx.post(f"{url}/v1/embeddings", json={"input": {SECRET: 1}})
        httpx.post(f"{url}/v1/completions", json={"prompt": SECRET, "max_tokens": 2})
        httpx.post(f"{url}/tokenize", json={"prompt": SECRET, "model": SECRET})
        httpx.get(f"{url}/v1/models/{SECRET}?q={SECRET}")
        httpx.get(f"{url}/{SECRET}", headers={"user-agent": SECRET, "x-request-id": f"{SECRET} !"})
        httpx.get(f"{url}/health")
    found = [line for line in parsed(lines) if line["event"] == "request"]
    assert [line["status"] for line in found] == [200, 400, 200, 404, 404, 404, 200]
    assert [line["route"] for line in found] == [
        "/v1/embeddings",
        "/v1/embeddings",
        "/v1/completions",
        "/tokenize",
        "/v1/models/{model:path}",
        "other",
        "/health",
    ]
    first = found[0]
    assert first["request_id"] == "r1"
    assert (first["method"], first["level"], first["inputs"]) == ("POST", "info", 1)
    assert first["prompt_tokens"] > 0 and first["ms"] > 0 and first["time"].startswith("20")
    assert found[-1]["level"] == "debug", "probes do not fill the log"
    assert SECRET not in lines.getvalue()


def test_an_answer_that_is_cut_off(lines: io.StringIO) -> None:
    with (
        running_state(fake_engine(num_blocks=4096, max_length=16000)) as state,
        serve_app(create_app(state)) as url,
    ):
        wish = {"prompt": "a", "max_tokens": 15000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=wish) as response:
            next(response.iter_lines())
    line = next(line for line in parsed(lines) if line["event"] == "request")
    assert (line["status"], line["aborted"]) == (200, True)


class Asked:
    """The part of a request that notes need."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}


def test_fields_of_routes() -> None:
    request = Asked()
    logs.note(request, prompt_tokens=3)
    logs.note(request, finish_reason="stop", prompt_tokens=4)
    assert request.scope[logs.FIELDS] == {"prompt_tokens": 4, "finish_reason": "stop"}


def test_exceptions_show_kind_and_place_only(lines: io.StringIO) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError:
        logging.getLogger("research.qwen.x").exception("failed")
    line = parsed(lines)[-1]
    assert line["event"] == "failed"
    assert line["exception"].startswith("KeyError at test_http_logs.py:")
    assert SECRET not in lines.getvalue()


def test_levels(lines: io.StringIO) -> None:
    logs.configure("warning", lines)
    logging.getLogger("research.qwen.x").info("quiet")
    logging.getLogger("other").info("quiet")
    logging.getLogger("research.qwen.x").warning("loud %s", "你好")
    assert [line["event"] for line in parsed(lines)] == ["loud 你好"]
    assert lines.getvalue().isascii(), "one line stays one line in every terminal"
