"""One record of a data file as dialogues: the published form, OpenAI's messages, Alpaca; refusals name their place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from research.qwen.errors import DataError
from research.qwen.messages import Message, Role, ToolCall
from research.qwen.text.react import tools_from
from research.qwen.train.agent import agent_dialogues
from research.qwen.train.rendering import Dialogue, Turn, whole_turns

PUBLISHED_ROLES: Final = ("user", "assistant")
MESSAGE_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# Names other collections use; the message says how they are called here.
_FOREIGN_ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def load_record(raw: bytes) -> Any:
    """Parse the JSON of one record. DataError if it is not UTF-8 or not JSON."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start} of the record; save the file as UTF-8"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 10, 0) : error.pos + 10]
        raise DataError(
            f"broken JSON: {error.msg} at character {error.pos} of the record, near {near!r}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"broken JSON: {error}") from None


def dialogues(record: Any, system: str) -> list[Dialogue]:
    """Return what the record teaches; several dialogues only for conversations with tools (see ``agent``).

    ``system`` is the system message of a conversation that has none. The form is recognised by the keys.

    Raises:
        DataError: an unknown form or role, wrong types, turns that do not alternate, or nothing to learn.
        PromptError, RequestError: tools, calls or results that a request could not hold either.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"expected an object, got {_kind(record)}")
    if "conversations" in record:
        return [_published(record, system)]
    if "messages" in record:
        return _openai(record, system)
    if "instruction" in record:
        return [_alpaca(record, system)]
    keys = ", ".join(map(str, list(record)[:6])) or "none"
    raise DataError(
        f"unknown form: expected the key conversations (published), messages (OpenAI) or instruction (Alpaca); "
        f"its keys are: {keys}"
    )


def _published(record: Mapping[str, Any], system: str) -> Dialogue:
    entries = _list(record["conversations"], "conversations")
    turns = [_published_turn(entry, f"conversations[{n}]") for n, entry in enumerate(entries)]
    if turns[0].role == "assistant":
        turns = turns[1:]  # the published rule: who only greets is left out
    alternate([turn.role for turn in turns], "conversations", len(entries) - len(turns))
    return [Turn("system", _text(record, "system", system)), *whole_turns(turns)]


def _published_turn(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected an object with from and value, got {_kind(entry)}")
    role, value = entry.get("from"), entry.get("value")
    if role not in PUBLISHED_ROLES:
        raise DataError(f"{where}.from: unknown role {role!r}; {_role_hint(role, PUBLISHED_ROLES)}")
    if not isinstance(value, str):
        raise DataError(f"{where}.value: expected a text, got {_kind(value)}")
    return Message(role, value)


def alternate(roles: Sequence[str], name: str, offset: int = 0) -> None:
    """DataError unless the turns are the user's and the assistant's by turns, and an answer is among them."""
    for n, role in enumerate(roles):
        expected = PUBLISHED_ROLES[n % 2]
        if role != expected:
            what = f"two {role} turns in a row" if n else f"the first turn is the {role}'s"
            raise DataError(
                f"{name}[{n + offset}]: {what}; user and assistant must alternate, beginning with user: join them, "
                f"or split the record"
            )
    if "assistant" not in roles:
        raise DataError(f"{name}: there is no answer of the assistant, so there is nothing to learn")


def _openai(record: Mapping[str, Any], system: str) -> list[Dialogue]:
    entries = _list(record["messages"], "messages")
    messages = [_message(entry, f"messages[{n}]") for n, entry in enumerate(entries)]
    _check_order(messages)
    tools = tools_from(_tool_list(record, "tools"), _tool_list(record, "functions"))
    return agent_dialogues(messages, tools, system)


def _check_order(messages: Sequence[Message]) -> None:
    """As for the published form; messages of the assistant that follow each other or results are one turn."""
    roles: list[str] = []
    places: list[int] = []
    for n, message in enumerate(messages):
        role = "assistant" if message.role == "tool" else message.role
        if role != "system" and not (role == "assistant" and roles[-1:] == ["assistant"]):
            roles.append(role)
            places.append(n)
    if messages[0].role == "tool":
        raise DataError("messages[0]: the result of a tool must follow a call")
    for n in range(1, len(roles)):
        if roles[n] == roles[n - 1]:
            raise DataError(
                f"messages[{places[n]}]: two user turns in a row; user and assistant must alternate: join them, or "
                f"split the record"
            )
    alternate(roles, "messages", places[0] if places else 0)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected an object with role and content, got {_kind(entry)}")
    name = entry.get("role")
    role = MESSAGE_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}.role: unknown role {name!r}; {_role_hint(name, tuple(MESSAGE_ROLES))}")
    if entry.get("weight", 1) != 1:
        raise DataError(
            f"{where}.weight: answers that are not to be learned are not supported; remove the key or them"
        )
    calls = tuple(_calls(entry, where))
    if calls and role != "assistant":
        raise DataError(f"{where}.tool_calls: belong to messages of the assistant only")
    content = entry.get("content")
    if content is None and calls:
        content = ""
    identity = entry.get("tool_call_id")
    return Message(
        role, _content(content, f"{where}.content"), calls, identity if isinstance(identity, str) else None
    )


def _content(content: Any, where: str) -> str:
    """A text, or OpenAI's list of text parts joined by newlines, as the server joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: expected a text, got {_kind(content)}")
    return "\n".join(_text_part(part, f"{where}[{n}]") for n, part in enumerate(content))


def _text_part(part: Any, where: str) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a text part; these models read text only")
    return text


def _calls(entry: Mapping[str, Any], where: str) -> list[ToolCall]:
    listed = entry.get("tool_calls") or []
    if not isinstance(listed, list):
        raise DataError(f"{where}.tool_calls: expected a list, got {_kind(listed)}")
    calls = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(listed)]
    if entry.get("function_call"):
        calls.append(_call({"function": entry["function_call"]}, f"{where}.function_call"))
    return calls


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise DataError(f"{where}: expected an object with a function of name and arguments")
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}.function.name: expected a text that is not empty, got {_kind(name)}")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise DataError(f"{where}.function.arguments: expected JSON as a text, got {_kind(arguments)}")
    identity = call.get("id")
    return ToolCall(identity if isinstance(identity, str) else "", name, arguments)


def _tool_list(record: Mapping[str, Any], key: str) -> list[Any] | None:
    """The tools of a record; some collections keep the list as JSON text."""
    value = record.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise DataError(f"{key}: broken JSON in the text: {error}") from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"{key}: expected a list, got {_kind(value)}")
    return value


def _alpaca(record: Mapping[str, Any], system: str) -> Dialogue:
    """instruction, newline, input ask; output answers; ``history`` holds earlier pairs."""
    question = _needed(record, "instruction")
    given = _text(record, "input", "")
    if given:
        question = f"{question}\n{given}"
    if not question:
        raise DataError("instruction: is empty, and so is input")
    pairs = [*_history(record.get("history") or []), (question, _needed(record, "output"))]
    messages: list[Message] = []
    for asked, answered in pairs:
        messages += [Message("user", asked), Message("assistant", answered)]
    return [Turn("system", _text(record, "system", "") or system), *whole_turns(messages)]


def _history(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"history: expected a list of pairs, got {_kind(value)}")
    for n, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{n}]: expected a pair of texts")
    return [(pair[0], pair[1]) for pair in value]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list, got {_kind(value)}")
    if not value:
        raise DataError(f"{name}: the list is empty, so there is nothing to learn")
    return value


def _needed(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise DataError(f"{key}: is missing; an Alpaca record has instruction, input and output")
    return _text(record, key, "")


def _text(record: Mapping[str, Any], key: str, default: str) -> str:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{key}: expected a text, got {_kind(value)}")
    return value


def _role_hint(role: Any, known: Sequence[str]) -> str:
    if role in _FOREIGN_ROLES if isinstance(role, str) else False:
        return f"it is called {_FOREIGN_ROLES[role]!r} here"
    if role == "system":
        return 'a system message stands beside conversations, as "system": "..."'
    return f"known are {', '.join(known)}"


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number")
