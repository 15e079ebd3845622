"""One choice of a chat answer: deltas of the engine in, pieces of the wire format out, streamed or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from research.qwen.messages import Delta, ToolCallDelta
from research.qwen.serve.logprobs import ShownTokens, TokenNames, chat_entry


class ToolParser(Protocol):
    """What turns the text of an answer into content and calls (``text.react.ReactStream``)."""

    def feed(self, text: str) -> list[str | ToolCallDelta]:
        """Take more text; what of it can be shown."""

    def finish(self) -> tuple[list[str | ToolCallDelta], str]:
        """The rest, and stop or tool_calls."""


@dataclass(frozen=True)
class Piece:
    """A ``delta`` of the wire with what belongs to it."""

    delta: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class ChoiceOptions:
    """How the choices of a request are written: best tokens per position (None: no logprobs), names of tokens."""

    names: TokenNames
    top_logprobs: int | None = None
    token_ids: bool = False
    legacy_functions: bool = False
    echo: str = ""


class ChatChoice:
    """See the module. ``add`` gives at most a few pieces; the last one has the finish reason."""

    def __init__(self, options: ChoiceOptions, shown: ShownTokens, parser: ToolParser | None = None):
        self._options, self._shown, self._parser = options, shown, parser
        self._begun = False
        self._entries: list[dict[str, Any]] = []
        self._ids: list[int] = []

    def add(self, delta: Delta) -> list[Piece]:
        """The pieces of the wire that a delta gives; often one, none while a character or a marker is incomplete."""
        options = self._options
        if options.top_logprobs is not None:
            entries = self._shown.add(delta)
            self._entries += [chat_entry(entry, options.names, options.top_logprobs) for entry in entries]
        self._ids += delta.ids
        pieces = self._open() + [self._piece(content) for content in self._contents(delta)]
        if delta.finish_reason is not None:
            rest, reason = self._parser.finish() if self._parser else ([], "stop")
            pieces += [self._piece(_wire(item, options.legacy_functions)) for item in rest]
            pieces.append(self._piece({}, self._reason(delta.finish_reason, reason)))
        return pieces

    def _open(self) -> list[Piece]:
        if self._begun:
            return []
        self._begun = True
        first = [Piece({"role": "assistant", "content": ""})]
        return [*first, Piece({"content": self._options.echo})] if self._options.echo else first

    def _contents(self, delta: Delta) -> list[dict[str, Any]]:
        if not delta.text:
            return []
        if self._parser is None:
            return [{"content": delta.text}]
        return [_wire(item, self._options.legacy_functions) for item in self._parser.feed(delta.text)]

    def _reason(self, engine: str, parsed: str) -> str:
        if engine == "stop" and parsed == "tool_calls":
            return "function_call" if self._options.legacy_functions else "tool_calls"
        return engine

    def _piece(self, delta: dict[str, Any], finish_reason: str | None = None) -> Piece:
        """A piece with the logprobs and ids that came since the last one."""
        entries, self._entries = self._entries, []
        ids, self._ids = self._ids, []
        logprobs = None
        if self._options.top_logprobs is not None and (entries or "content" in delta):
            logprobs = {"content": entries, "refusal": None}
        return Piece(delta, logprobs, finish_reason, ids if self._options.token_ids else None)


def _wire(item: str | ToolCallDelta, legacy: bool) -> dict[str, Any]:
    if isinstance(item, str):
        return {"content": item}
    function: dict[str, Any] = {"name": item.name} if item.name is not None else {}
    function["arguments"] = item.arguments
    if legacy:
        return {"function_call": function}
    call: dict[str, Any] = {"index": item.index}
    if item.id is not None:
        call |= {"id": item.id, "type": "function"}
    return {"tool_calls": [{**call, "function": function}]}


def message_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The message that a client would put together from the deltas of one choice.

    Content is null beside calls that have no text, and "" for an empty answer; without calls there is no list.
    """
    text: list[str] = []
    calls: list[dict[str, Any]] = []
    function: dict[str, str] | None = None
    for piece in pieces:
        text.append(piece.delta.get("content") or "")
        for call in piece.delta.get("tool_calls", ()):
            _merge_call(calls, call)
        if "function_call" in piece.delta:
            part = piece.delta["function_call"]
            function = function or {"name": part.get("name", ""), "arguments": ""}
            function["arguments"] += part["arguments"]
    content: str | None = "".join(text)
    if not content and (calls or function):
        content = None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    if function:
        message["function_call"] = function
    return message


def _merge_call(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    while len(calls) <= call["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    whole = calls[call["index"]]
    whole["id"] = call.get("id", whole["id"])
    whole["function"]["name"] += call["function"].get("name", "")
    whole["function"]["arguments"] += call["function"]["arguments"]


def logprobs_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The ``logprobs`` object of a whole choice."""
    parts = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return {"content": [entry for part in parts for entry in part["content"]], "refusal": None}
