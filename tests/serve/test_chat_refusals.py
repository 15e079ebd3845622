"""What /v1/chat/completions refuses: always 400 (or 404) in the envelope, with the field at fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.scripted import Script, scripted_server

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello", max_length=128) as script:
        yield script


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages"),
        (
            {"messages": [*HI, {"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages[1].tool_calls",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[1].tool_calls[0].function.name",
        ),
        ({"messages": [{"role": "tool", "content": "x"}, *HI]}, "messages[0]"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ],
)
def test_refused(server: Script, body: dict[str, Any], param: str) -> None:
    whole = body if "messages" in body or not body else {"messages": HI, **body}
    error = server.refusal(CHAT, whole)
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error


def test_too_long_a_prompt_is_named_with_the_numbers(server: Script) -> None:
    error = server.refusal(CHAT, {"messages": [{"role": "user", "content": "word " * 500}]})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "128" in error["message"]
    wish = server.refusal(CHAT, {"messages": HI, "max_tokens": 128})
    assert wish["code"] == "context_length_exceeded"


def test_unknown_model(server: Script) -> None:
    error = server.refusal(CHAT, {"model": "gpt-9", "messages": HI}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_refused_before_a_stream_begins(server: Script) -> None:
    server.refusal(CHAT, {"messages": HI, "stream": True, "temperature": -1})


def test_lone_surrogates_do_no_harm(server: Script) -> None:
    raw = b'{"messages":[{"role":"user","content":"\\ud83d"}],"request_id":"\\ud83d","stop":["\\ud800"]}'
    response = server.client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400)
    assert response.json()
