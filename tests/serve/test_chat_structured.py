"""Answers held to a form, by a model that wants to say something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.scripted import Script, scripted_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["罗马", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}


def form_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("I would rather talk.") as script:
        yield script


def is_trip(text: str) -> bool:
    trip = json.loads(text)
    return set(trip) == {"city", "days"} and trip["city"] in ("罗马", "Oslo") and 1 <= trip["days"] <= 9


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": JSON_SCHEMA},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ],
)
def test_schema(server: Script, body: dict[str, Any]) -> None:
    whole = server.chat(**body, temperature=0, max_tokens=200)["choices"][0]
    assert is_trip(whole["message"]["content"]) and whole["finish_reason"] == "stop"
    chunks = server.chat_events(**body, temperature=0, max_tokens=200)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["message"]["content"]


def test_every_choice_has_a_state_of_its_own(server: Script) -> None:
    choices = server.chat(response_format=JSON_SCHEMA, n=4, temperature=1.5, seed=1, max_tokens=300)[
        "choices"
    ]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(is_trip(text) for text in texts) and len(set(texts)) > 1


def test_any_object(server: Script) -> None:
    server.lm.reply = '{"a": [1, "罗马 🙂"]} and more'
    try:
        choice = server.chat(response_format={"type": "json_object"}, max_tokens=100)["choices"][0]
    finally:
        server.lm.reply = "I would rather talk."
    assert json.loads(choice["message"]["content"]) == {"a": [1, "罗马 🙂"]}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("nested", [False, True])
def test_choice_and_pattern(server: Script, nested: bool) -> None:
    def form(kind: str, value: Any) -> dict[str, Any]:
        return {"structured_outputs": {kind: value}} if nested else {f"guided_{kind}": value}

    texts = ["罗马 🙂", "Oslo"]
    assert server.chat(**form("choice", texts), max_tokens=50)["choices"][0]["message"]["content"] in texts
    number = server.chat(**form("regex", "[0-9]{3}-[0-9]{2}"), max_tokens=50)["choices"][0]["message"][
        "content"
    ]
    assert len(number) == 6 and number[3] == "-"


def test_text_is_free(server: Script) -> None:
    choice = server.chat(response_format={"type": "text"})["choices"][0]
    assert choice["message"]["content"] == "I would rather talk."


def test_completions(server: Script) -> None:
    body = server.complete(prompt=["a", "b"], response_format=JSON_SCHEMA, temperature=0, max_tokens=200)
    assert all(is_trip(choice["text"]) for choice in body["choices"])


def test_logprobs_stay_those_of_the_model(server: Script) -> None:
    free = server.chat(logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"][0]
    held = server.chat(logprobs=True, top_logprobs=1, response_format=JSON_SCHEMA, max_tokens=300)
    first = held["choices"][0]["logprobs"]["content"][0]
    assert first["top_logprobs"] == free["top_logprobs"] and first["logprob"] < free["logprob"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form_of({"type": "x"}), "response_format.json_schema.schema"),
        (form_of(5), "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": [5]}, "guided_choice[0]"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_grammar": "start: \"a\""}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"response_format": JSON_SCHEMA, "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_refused(server: Script, path: str, body: dict[str, Any], param: str) -> None:
    error = server.refusal(path, {"messages": HI, "prompt": "x", **body})
    assert error["param"] == param and error["type"] == "invalid_request_error"
