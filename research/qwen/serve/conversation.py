"""Messages as clients send them to the values the prompt is built from; each refusal names its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from research.qwen.messages import Message, Role, ToolCall
from research.qwen.serve.protocol import ChatMessage
from research.qwen.serve.sampling import refuse

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def to_messages(items: Sequence[ChatMessage]) -> list[Message]:
    """The conversation as values.

    Several text parts of a content are joined by newlines. ``developer`` is system, ``function`` is tool.

    Raises:
        ApiError: 400 for an unknown role, content that is no text, or a malformed tool call.
    """
    if not items:
        raise refuse("messages", "is empty; give at least one user message")
    return [_message(item, f"messages[{place}]") for place, item in enumerate(items)]


def _message(item: ChatMessage, where: str) -> Message:
    role = ROLES.get(item.role)
    if role is None:
        raise refuse(f"{where}.role", f"is {item.role!r}; use {', '.join(ROLES)}")
    calls = _calls(item, where)
    if calls and role != "assistant":
        raise refuse(f"{where}.tool_calls", "belong to assistant messages only")
    content = _content(item.content, f"{where}.content", optional=role == "assistant")
    return Message(role, content, calls, item.tool_call_id, item.name)


def _content(content: Any, where: str, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise refuse(where, "must be a string or a list of text parts")
    if not isinstance(content, list):
        raise refuse(where, "must be a string or a list of text parts")
    return "\n".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    field = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise refuse(
            where, f"is of type {kind!r}; these models read text only: send {{type: 'text', text: ...}}"
        )
    text = part.get(field)
    if not isinstance(text, str):
        raise refuse(f"{where}.{field}", "must be a string")
    return text


def _calls(item: ChatMessage, where: str) -> tuple[ToolCall, ...]:
    calls = [
        _call(call, call.get("function"), f"{where}.tool_calls[{place}]")
        for place, call in enumerate(item.tool_calls or ())
    ]
    if item.function_call:
        calls.append(_call({}, item.function_call, f"{where}.function_call"))
    return tuple(calls)


def _call(call: Mapping[str, Any], function: Any, where: str) -> ToolCall:
    if call.get("type", "function") != "function":
        raise refuse(f"{where}.type", f"is {call['type']!r}; only function calls are known")
    if not isinstance(function, Mapping):
        raise refuse(f"{where}.function", "must be an object with name and arguments")
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not name:
        raise refuse(f"{where}.function.name", "must be a non-empty string")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise refuse(f"{where}.function.arguments", "must be a string with JSON")
    identity = call.get("id")
    return ToolCall(identity if isinstance(identity, str) else "", name, arguments)
