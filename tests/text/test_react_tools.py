"""Tools and tool choices of requests: every form that is understood, and errors that name the place."""

from __future__ import annotations

from typing import Any

import pytest

from research.qwen.errors import RequestError
from research.qwen.text.react_tools import Tool, ToolChoice, instruction, tools_from
from tests.text.agent_files import WEATHER

OWN_FORM = {
    "name_for_model": "google_search",
    "name_for_human": "谷歌搜索",
    "description_for_model": "通用搜索引擎",
    "parameters": [
        {"name": "query", "description": "搜索关键词", "required": True, "schema": {"type": "string"}},
        {"name": "page", "schema": {"type": "integer"}},
    ],
}


def test_openai_tools_and_functions_are_the_same() -> None:
    (tool,) = tools_from([{"type": "function", "function": {**WEATHER, "strict": True}}])
    assert tool == Tool(
        "get_weather",
        "Weather of a city.",
        WEATHER["parameters"],
        "get_weather",
        strict=True,
    )
    (function,) = tools_from(None, [WEATHER])
    assert (function.name, function.schema, function.strict) == (tool.name, WEATHER["parameters"], False)
    assert tools_from([WEATHER]) == tools_from([], [WEATHER]) == (function,)


def test_qwens_own_form() -> None:
    (tool,) = tools_from([{"type": "function", "function": OWN_FORM}])
    assert tools_from([OWN_FORM]) == (tool,)
    assert (tool.name, tool.name_for_human) == ("google_search", "谷歌搜索")
    assert tool.parameters == OWN_FORM["parameters"]
    assert tool.schema == {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "搜索关键词"}, "page": {"type": "integer"}},
        "required": ["query"],
    }
    assert "google_search: Call this tool to interact with the 谷歌搜索 API." in tool.describe()


def test_left_out_fields() -> None:
    (tool,) = tools_from(None, [{"name": "now"}])
    assert tool == Tool("now", name_for_human="now")
    assert tool.schema == {"type": "object", "properties": {}}
    assert Tool("now", parameters={}).schema == {"type": "object"}
    (named,) = tools_from([{"name_for_model": "now"}])
    assert named.name_for_human == "now"
    assert tools_from(None) == tools_from([], []) == ()


@pytest.mark.parametrize(
    ("tools", "functions", "place"),
    [
        ([WEATHER], [WEATHER], "tools and functions cannot be used together"),
        ("now", None, "tools: expected a list"),
        (["now"], None, r"tools\[0\]: expected an object"),
        ([WEATHER, {"type": "web_search"}], None, r"tools\[1\].type: 'web_search'"),
        ([{"type": "function", "function": "now"}], None, r"tools\[0\].function: expected an object"),
        ([{"type": "function", "function": {}}], None, r"tools\[0\].function.name: expected 1 to 128"),
        (None, [{"name": "a\nb"}], r"functions\[0\].name"),
        (None, [{"name": "a\x07b"}], r"functions\[0\].name"),
        (None, [{"name": " a"}], r"functions\[0\].name"),
        (None, [{"name": "a" * 129}], r"functions\[0\].name"),
        (None, [{"name": 3}], r"functions\[0\].name: expected a string"),
        (None, [{"name": "a", "description": 3}], r"functions\[0\].description: expected a string"),
        (None, [{"name": "a", "parameters": "x"}], r"functions\[0\].parameters: expected a JSON schema"),
        (
            None,
            [{"name": "a", "parameters": [{}]}],
            r"functions\[0\].parameters\[0\]: expected an object with a name",
        ),
        (None, [{"name": "a", "args_format": "xml"}], r"functions\[0\].args_format"),
        ([WEATHER, WEATHER], None, r"tools\[1\]: the name 'get_weather' comes twice"),
    ],
)
def test_malformed_tools_name_the_place(tools: Any, functions: Any, place: str) -> None:
    with pytest.raises(RequestError, match=place):
        tools_from(tools, functions)


TOOLS = tools_from([WEATHER, {"name": "now"}])


@pytest.mark.parametrize(
    ("tool_choice", "function_call", "expected"),
    [
        (None, None, ToolChoice("auto")),
        ("none", None, ToolChoice("none")),
        ("auto", None, ToolChoice("auto")),
        ("required", None, ToolChoice("required")),
        ({"type": "function", "function": {"name": "now"}}, None, ToolChoice("named", "now")),
        ({"type": "function", "name": "now"}, None, ToolChoice("named", "now")),
        (None, "none", ToolChoice("none")),
        (None, "auto", ToolChoice("auto")),
        (None, {"name": "now"}, ToolChoice("named", "now")),
    ],
)
def test_choices(tool_choice: Any, function_call: Any, expected: ToolChoice) -> None:
    assert ToolChoice.parse(tool_choice, function_call, TOOLS) == expected


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_without_tools_nothing_is_chosen(choice: Any) -> None:
    assert ToolChoice.parse(choice) == ToolChoice("none")


@pytest.mark.parametrize(
    ("tool_choice", "function_call", "tools", "message"),
    [
        ("required", None, (), "tool_choice: a call is demanded"),
        ({"function": {"name": "now"}}, None, (), "tool_choice: a call is demanded"),
        ({"function": {"name": "later"}}, None, TOOLS, "no tool named 'later'; given are get_weather, now"),
        (None, {"name": "later"}, TOOLS, "function_call: there is no tool named 'later'"),
        ("any", None, TOOLS, "tool_choice: expected"),
        (None, "required", TOOLS, "function_call: expected"),
        (3, None, TOOLS, "tool_choice: expected"),
        ({"type": "allowed_tools"}, None, TOOLS, "tool_choice: expected"),
        ({"type": "function", "function": {}}, None, TOOLS, "tool_choice: expected"),
    ],
)
def test_wrong_choices(tool_choice: Any, function_call: Any, tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ToolChoice.parse(tool_choice, function_call, tools)


def test_hints_say_how_to_write_arguments() -> None:
    tools = (Tool("a"), Tool("b", args_format="code"))
    assert "JSON object." not in instruction(tools) and "backticks" not in instruction(tools)
    hinted = instruction(tools, hints=True)
    assert (
        'Parameters: {"type": "object", "properties": {}} Format the arguments as a JSON object.\n' in hinted
    )
    assert "Enclose the code within triple backticks" in hinted
    assert "should be one of [a, b]\n" in hinted
