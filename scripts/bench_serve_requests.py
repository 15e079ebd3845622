"""Requests of all kinds for the soak: what is asked, how an answer is read, what must be refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from research.qwen.demo import demo_folder

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Wish:
    """One request with an answer that depends on nothing but it."""

    path: str
    body: dict[str, Any]

    def asked(self, stream: bool, salt: str = "") -> dict[str, Any]:
        """The body to send."""
        return {**self.body, "stream": stream} | ({"cache_salt": salt} if salt else {})


@dataclass(frozen=True)
class Bad:
    """A request that must be refused with a status of 400 to 499 and an error in the envelope."""

    path: str
    content: bytes
    kind: str = "application/json"


@dataclass
class Choice:
    """One choice of an answer, streamed or whole; ids of calls are left out, since they are random."""

    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    reason: str | None = None
    scores: list[Any] = field(default_factory=list)

    def take(self, choice: dict[str, Any]) -> None:
        """A chunk's choice, or a whole one."""
        part = choice.get("delta", choice.get("message", choice))
        self.text += part.get("text") or part.get("content") or ""
        for place, call in enumerate(part.get("tool_calls") or ()):
            known = self.calls.setdefault(call.get("index", place), ["", ""])
            known[0] += call["function"].get("name") or ""
            known[1] += call["function"].get("arguments") or ""
        scores = choice.get("logprobs") or {}
        self.scores += scores.get("content") or scores.get("token_logprobs") or []
        self.reason = choice.get("finish_reason") or self.reason


class Answer:
    """The choices of an answer; equal if all of them are."""

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}

    def take(self, body: dict[str, Any]) -> None:
        """A whole answer, or one event of a stream."""
        for choice in body.get("choices", ()):
            self.choices.setdefault(choice["index"], Choice()).take(choice)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and self.choices == other.choices

    def __repr__(self) -> str:
        return repr(self.choices)


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations the demo model knows: every question as a last turn."""
    known = json.loads((demo_folder().parent / "dialogues.json").read_text(encoding="utf-8"))
    found: list[list[dict[str, str]]] = []
    for dialogue in known["dialogues"]:
        messages: list[dict[str, str]] = []
        for question, answer in dialogue["turns"]:
            messages = [*messages, {"role": "user", "content": question}]
            found.append(messages)
            messages = [*messages, {"role": "assistant", "content": answer}]
    return found


def wishes() -> list[Wish]:
    """Different requests: chats, completions, several choices, seeds, scores, tools, forms."""
    chats = dialogues()
    greedy = {"temperature": 0, "max_tokens": 64}
    found = [Wish(CHAT, {"messages": messages, **greedy}) for messages in chats]
    found += [Wish(CHAT, {"messages": m, **extra}) for m, extra in zip(chats, _extras(), strict=False)]
    texts = [messages[-1]["content"] for messages in chats[:8]]
    found += [Wish(COMPLETIONS, {"prompt": text, **greedy}) for text in texts[:4]]
    found += [
        Wish(COMPLETIONS, {"prompt": texts[:3], "max_tokens": 12, "temperature": 0}),
        Wish(COMPLETIONS, {"prompt": list(range(300, 420)), "max_tokens": 24, "temperature": 0}),
        Wish(COMPLETIONS, {"prompt": texts[4], "max_tokens": 0, "echo": True, "logprobs": 2}),
        Wish(COMPLETIONS, {"prompt": texts[5], "max_tokens": 150, "temperature": 0, "ignore_eos": True}),
        Wish(COMPLETIONS, {"prompt": texts[6], "max_tokens": 30, "temperature": 1.5, "seed": 4, "n": 2}),
    ]
    return found


def _extras() -> Iterable[dict[str, Any]]:
    greedy = {"temperature": 0, "max_tokens": 48}
    named = {"type": "function", "function": {"name": "weather"}}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    return (
        {"temperature": 1.2, "seed": 11, "max_tokens": 40},
        {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 20},
        {**greedy, "logprobs": True, "top_logprobs": 3},
        {**greedy, "stop": ["。", "1."]},
        {**greedy, "tools": [WEATHER]},
        {**greedy, "tools": [WEATHER], "tool_choice": "required"},
        {**greedy, "tools": [WEATHER], "tool_choice": named},
        {**greedy, "response_format": {"type": "json_object"}},
        {**greedy, "response_format": schema},
        {**greedy, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {**greedy, "min_tokens": 30, "logit_bias": {"300": 5}},
    )


def malformed() -> list[Bad]:
    """Requests with a mistake each."""
    turn = [{"role": "user", "content": "你好"}]
    wrong: Sequence[dict[str, Any]] = (
        {},
        {"messages": []},
        {"messages": "你好"},
        {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": turn, "model": "another"},
        {"messages": turn, "temperature": "hot"},
        {"messages": turn, "temperature": -1},
        {"messages": turn, "n": 0},
        {"messages": turn, "max_tokens": 1_000_000},
        {"messages": turn, "logit_bias": {"123456789": 1}},
        {"messages": turn, "top_logprobs": 99, "logprobs": True},
        {"messages": turn, "response_format": {"type": "poem"}},
        {
            "messages": turn,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}},
        },
        {"messages": turn, "tools": [{"type": "function", "function": {}}]},
        {"messages": turn, "tool_choice": "required"},
        {"messages": [{"role": "user", "content": "长" * 9000}]},
        {"messages": turn, "stream_options": {"include_usage": True}},
    )
    found = [Bad(CHAT, json.dumps(body).encode()) for body in wrong]
    more: Sequence[dict[str, Any]] = (
        {"prompt": []},
        {"prompt": [1, 99999999]},
        {"prompt": "a", "suffix": "b"},
        {"prompt": {"a": 1}},
    )
    found += [Bad(COMPLETIONS, json.dumps(body).encode()) for body in more]
    return [
        *found,
        Bad(CHAT, b'{"messages": ['),
        Bad(CHAT, b"\xff\xfe\x00"),
        Bad(CHAT, b"[]"),
        Bad(CHAT, b"null"),
        Bad(CHAT, b"[" * 100_000),
        Bad(CHAT, b'{"messages": [{"role": "user", "content": "\\ud83d"}], "temperature": NaN}'),
        Bad(COMPLETIONS, b'{"prompt": "a"}', "text/plain"),
        Bad("/v1/nothing", b"{}"),
        Bad("/v1/embeddings", b'{"input": [[]]}'),
    ]
