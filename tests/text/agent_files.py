"""Reading the golden files of the published agent interface."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from research.qwen.messages import Message, Role, ToolCall

FIXTURES = Path(__file__).parents[1] / "fixtures" / "agent"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def agent_golden(name: str) -> list[dict[str, Any]]:
    """The objects of one golden file."""
    with gzip.open(FIXTURES / f"{name}.jsonl.gz", "rt", encoding="ascii") as file:
        return [json.loads(line) for line in file]


def message_of(wire: dict[str, Any]) -> Message:
    """A message of the published server as ours; its results of functions have no id."""
    call = wire.get("function_call")
    calls = (ToolCall("call_0", call["name"], call.get("arguments", "")),) if call else ()
    role: Role = "tool" if wire["role"] == "function" else wire["role"]
    return Message(role, wire["content"] or "", calls)
