"""Whole requests of the published server over HTTP: the same answers, and streams where it has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.scripted import Script, scripted_server
from tests.text.agent_files import agent_golden

CHAT = "/v1/chat/completions"
CASES = [case for case in agent_golden("requests") if not case["error"]]
# Published: a stop word with leading newlines also stops without them. Here stop strings mean what they say.
UNSTOPPED = "stop word with leading newlines gets a second form"


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("", max_length=2048) as script:
        yield script


@pytest.fixture(params=CASES, ids=[case["name"] for case in CASES])
def case(request: pytest.FixtureRequest, server: Script) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    server.fresh(found["reply"].removesuffix("<|im_end|>"))
    return found


def body_of(case: dict[str, Any]) -> dict[str, Any]:
    return {**case["request"], "model": "qwen"}


def expected(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    choice = case["response"]["choices"][0]
    content = case["reply"] if case["name"] == UNSTOPPED else choice["message"]["content"]
    return content, choice["message"]["function_call"], choice["finish_reason"]


def test_whole(server: Script, case: dict[str, Any]) -> None:
    choice = server.post(CHAT, body_of(case))["choices"][0]
    message = choice["message"]
    assert (message["content"], message.get("function_call"), choice["finish_reason"]) == expected(case)


def test_streamed(server: Script, case: dict[str, Any]) -> None:
    content, call, reason = "", {}, None
    for chunk in server.events(CHAT, body_of(case)):
        choice = chunk["choices"][0]
        content += choice["delta"].get("content") or ""
        for field, value in choice["delta"].get("function_call", {}).items():
            call[field] = call.get(field, "") + value
        reason = choice["finish_reason"]
    assert (content, call or None, reason) == expected(case)


def test_sampling(server: Script, case: dict[str, Any]) -> None:
    """``top_k`` 1 is how the published server says greedy."""
    server.post(CHAT, body_of(case))
    _, params = server.asked[0]
    published = case["model_call"]["gen_kwargs"]
    assert params.greedy == (published.get("top_k") == 1 or not published)
    if published.get("top_k", 1) != 1:
        assert {name: getattr(params, name) for name in published} == published
