"""Tools as requests describe them: OpenAI's ``tools`` and ``functions``, and Qwen's own form, as checked values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from research.qwen.errors import RequestError

ChoiceKind = Literal["none", "auto", "required", "named"]
NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}
MAX_NAME = 128  # characters

# The wording the models were trained on; it is data, not prose: a changed comma changes what they answer.
_DESCRIPTION = (
    "{name}: Call this tool to interact with the {human} API. "
    "What is the {human} API useful for? {description} Parameters: {parameters}{hint}"
)
_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{descriptions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_HINTS = {
    "json": " Format the arguments as a JSON object.",
    "code": " Enclose the code within triple backticks (`) at the beginning and end of the code.",
}


@dataclass(frozen=True)
class Tool:
    """One tool the model may call.

    ``parameters`` is a JSON schema, or a list of ``{name, description, required, schema}`` in Qwen's form; the prompt
    shows it as given. ``args_format`` is "json", or "code" for a tool that takes bare code.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=lambda: NO_PARAMETERS)
    name_for_human: str = ""
    args_format: Literal["json", "code"] = "json"
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments, whichever form ``parameters`` has."""
        if isinstance(self.parameters, Mapping):
            return self.parameters or {"type": "object"}
        known = {str(entry["name"]): _entry_schema(entry) for entry in self.parameters}
        required = [str(entry["name"]) for entry in self.parameters if entry.get("required")]
        return {"type": "object", "properties": known, "required": required}

    def describe(self, *, hint: bool = False) -> str:
        """The tool's paragraph in the prompt; ``hint`` adds how to write the arguments, as the published example."""
        return _DESCRIPTION.format(
            name=self.name,
            human=self.name_for_human or self.name,
            description=self.description,
            parameters=json.dumps(self.parameters, ensure_ascii=False),
            hint=_HINTS[self.args_format] if hint else "",
        )


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model must, may or must not call; ``name`` is the tool of kind "named"."""

    kind: ChoiceKind = "auto"
    name: str | None = None

    @classmethod
    def parse(cls, tool_choice: Any, function_call: Any = None, tools: Sequence[Tool] = ()) -> ToolChoice:
        """Read OpenAI's ``tool_choice``, or the older ``function_call``; without either: "auto" if there are tools.

        Raises:
            RequestError: an unknown form, a tool that was not given, or a demand for a call without tools.
        """
        if tool_choice is None and function_call is None:
            return cls("auto" if tools else "none")
        where = "tool_choice" if tool_choice is not None else "function_call"
        choice = cls._read(tool_choice if tool_choice is not None else function_call, where)
        if not tools:
            if choice.kind in ("required", "named"):
                raise RequestError(f"{where}: a call is demanded, but the request has no tools")
            return cls("none")
        if choice.kind == "named" and choice.name not in {tool.name for tool in tools}:
            known = ", ".join(tool.name for tool in tools)
            raise RequestError(f"{where}: there is no tool named {choice.name!r}; given are {known}")
        return choice

    @classmethod
    def _read(cls, value: Any, where: str) -> ToolChoice:
        if isinstance(value, str):
            kinds: tuple[ChoiceKind, ...] = ("none", "auto", "required")
            for kind in kinds[: 3 if where == "tool_choice" else 2]:
                if value == kind:
                    return cls(kind)
        elif isinstance(value, Mapping) and value.get("type", "function") == "function":
            inner = value.get("function", value)
            if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
                return cls("named", inner["name"])
        form = (
            '{"type": "function", "function": {"name": ...}}' if where == "tool_choice" else '{"name": ...}'
        )
        words = '"none", "auto", "required"' if where == "tool_choice" else '"none", "auto"'
        raise RequestError(f"{where}: expected {words} or {form}, got {json.dumps(value, default=str)[:200]}")


def tools_from(tools: Sequence[Any] | None, functions: Sequence[Any] | None = None) -> tuple[Tool, ...]:
    """Read the tools of a request: OpenAI's ``tools``, its older ``functions``, or Qwen's own form in either.

    Raises:
        RequestError: both are given, an entry is malformed (the message names its place), or a name comes twice.
    """
    if tools and functions:
        raise RequestError(
            "tools and functions cannot be used together: functions is the older form of tools"
        )
    where = "tools" if tools else "functions"
    listed = tools or functions or ()
    if isinstance(listed, str | Mapping) or not isinstance(listed, Sequence):
        raise RequestError(f"{where}: expected a list")
    result: list[Tool] = []
    for number, entry in enumerate(listed):
        tool = _tool(entry, f"{where}[{number}]")
        if any(tool.name == other.name for other in result):
            raise RequestError(f"{where}[{number}]: the name {tool.name!r} comes twice")
        result.append(tool)
    return tuple(result)


def instruction(tools: Sequence[Tool], *, hints: bool = False) -> str:
    """The text that goes before the question: what the tools are and the format of an answer."""
    return _INSTRUCTION.format(
        descriptions="\n\n".join(tool.describe(hint=hints) for tool in tools),
        names=", ".join(tool.name for tool in tools),
    )


def _tool(entry: Any, where: str) -> Tool:
    if not isinstance(entry, Mapping):
        raise RequestError(f"{where}: expected an object")
    if entry.get("type", "function") != "function":
        raise RequestError(f"{where}.type: {entry['type']!r} is not supported; only functions are")
    if "function" in entry:
        entry, where = entry["function"], f"{where}.function"
        if not isinstance(entry, Mapping):
            raise RequestError(f"{where}: expected an object")
    name = _text(entry, ("name_for_model", "name"), where)
    if not name or name != name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise RequestError(
            f"{where}.name: expected 1 to {MAX_NAME} printable characters, not starting or ending with a space"
        )
    args_format = entry.get("args_format", "json")
    if args_format not in _HINTS:
        raise RequestError(f"{where}.args_format: expected one of {', '.join(_HINTS)}, got {args_format!r}")
    return Tool(
        name,
        _text(entry, ("description_for_model", "description"), where),
        _parameters(entry.get("parameters"), f"{where}.parameters"),
        _text(entry, ("name_for_human",), where) or _text(entry, ("name",), where) or name,
        args_format,
        bool(entry.get("strict")),
    )


def _text(entry: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """The first of these fields that is there."""
    for key in keys:
        value = entry.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise RequestError(f"{where}.{key}: expected a string")
            return value
    return ""


def _parameters(value: Any, where: str) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
    if value is None:
        return NO_PARAMETERS
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"{where}: expected a JSON schema (an object), or a list of named parameters")
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise RequestError(f"{where}[{number}]: expected an object with a name")
    return value


def _entry_schema(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = dict(entry.get("schema") or {})
    if "description" in entry:
        schema.setdefault("description", entry["description"])
    return schema
