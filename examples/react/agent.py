"""The loop of an agent: ask the model, do what it calls for, show it the results, until it answers.

The model is behind ``Backend``: an ``Engine`` in this process, or any OpenAI server.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from examples.react.toolbox import Toolbox
from research.qwen.engine import Engine
from research.qwen.errors import QwenError, RequestError
from research.qwen.messages import Message, ToolCall, ToolCallDelta
from research.qwen.text.react import Tool, ToolChoice, build_prompt

Show = Callable[[str], None]


class ServerError(QwenError, RuntimeError):
    """The server could not be reached, or refused the request."""


class Backend(Protocol):
    """A model that answers a conversation with text, or with calls of tools."""

    def answer(self, messages: Sequence[Message], tools: Sequence[Tool], *, may_call: bool) -> Message:
        """The assistant's next message; without ``may_call`` it has no calls."""
        ...


class EngineBackend:
    """A model in this process; ``show`` gets content and calls as they are written."""

    def __init__(self, engine: Engine, *, max_tokens: int = 512, show: Show = lambda text: None):
        if engine.tokenizer is None:
            raise RequestError("an agent needs a model with a vocabulary")
        self.engine, self.tokenizer, self.show = engine, engine.tokenizer, show
        self.max_tokens = max_tokens
        self.params = engine.default_params(temperature=0.0)

    def answer(self, messages: Sequence[Message], tools: Sequence[Tool], *, may_call: bool) -> Message:
        """See ``Backend``."""
        choice = ToolChoice("auto" if may_call and tools else "none")
        prompt = build_prompt(messages, tools, choice, self.tokenizer)
        room = self.engine.lm.max_length - len(prompt.ids)
        params = replace(self.params, stop=prompt.stop, max_new_tokens=max(1, min(room, self.max_tokens)))
        reader, pieces = prompt.stream(), []
        for delta in self.engine.stream(prompt.ids, params):
            pieces += self._shown([delta.text] if prompt.plain else reader.feed(delta.text))
        pieces += self._shown([] if prompt.plain else reader.finish()[0])
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        return Message("assistant", content, _calls([p for p in pieces if isinstance(p, ToolCallDelta)]))

    def _shown(self, pieces: Sequence[str | ToolCallDelta]) -> list[str | ToolCallDelta]:
        for piece in pieces:
            if isinstance(piece, str):
                self.show(piece)
            else:
                self.show(f"\n[{piece.name}] " if piece.name else piece.arguments)
        return list(pieces)


class ServerBackend:
    """A model behind an OpenAI server; ``url`` may end in /v1 or not."""

    def __init__(
        self,
        url: str,
        *,
        model: str = "qwen",
        api_key: str = "",
        max_tokens: int = 512,
        timeout: float = 600.0,
        show: Show = lambda text: None,
    ):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self.model, self.api_key, self.max_tokens = model, api_key, max_tokens
        self.timeout, self.show = timeout, show

    def answer(self, messages: Sequence[Message], tools: Sequence[Tool], *, may_call: bool) -> Message:
        """See ``Backend``.

        Raises:
            ServerError: no server there, or it refuses; its own message is passed on.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_to_wire(message) for message in messages],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        if tools:
            body |= {
                "tools": [_tool_to_wire(tool) for tool in tools],
                "tool_choice": "auto" if may_call else "none",
            }
        try:
            message = self._post(body)["choices"][0]["message"]
            calls = tuple(
                ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls") or ()
            )
            answer = Message("assistant", message.get("content") or "", calls)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError(f"{self.url}: the answer is not a chat completion") from None
        self.show(answer.content + "".join(f"\n[{call.name}] {call.arguments}" for call in calls))
        return answer

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.url}: {error.code}: {_reason(error.read())}") from None
        except (OSError, ValueError) as error:
            raise ServerError(f"{self.url}: {error}; is the server running?") from None


class Agent:
    """A model with tools.

    Args:
        backend: the model.
        toolbox: what it may do.
        max_steps: answers with calls before it has to answer without.
        show: gets the results of tools as text, for people to read.
    """

    def __init__(
        self, backend: Backend, toolbox: Toolbox, *, max_steps: int = 6, show: Show = lambda text: None
    ):
        self.backend, self.toolbox, self.max_steps, self.show = backend, toolbox, max_steps, show

    def run(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages that follow: calls, their results, and last the answer."""
        added: list[Message] = []
        for step in range(self.max_steps + 1):
            answer = self.backend.answer(
                [*messages, *added], self.toolbox.tools, may_call=step < self.max_steps
            )
            added.append(answer)
            if not answer.tool_calls:
                break
            for call in answer.tool_calls:
                result = self.toolbox.run(call)
                self.show(f"\n-> {result}\n")
                added.append(Message("tool", result, tool_call_id=call.id, name=call.name))
        return added

    def ask(self, question: str) -> str:
        """The answer to one question."""
        return self.run([Message("user", question)])[-1].content


def _calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    heads = [delta for delta in deltas if delta.id is not None]
    return tuple(
        ToolCall(
            head.id or "", head.name or "", "".join(d.arguments for d in deltas if d.index == head.index)
        )
        for head in heads
    )


def _to_wire(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def _tool_to_wire(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return {"type": "function", "function": function}


def _reason(body: bytes) -> str:
    """The message of an error in OpenAI's form, or the beginning of what came instead."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
