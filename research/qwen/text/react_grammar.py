"""Grammars (llguidance's lark dialect) that hold an answer to the ReAct format and the arguments to their schema."""

from __future__ import annotations

import json
from collections.abc import Sequence

from research.qwen.text.react_tools import Tool

# Calls are one line: with free white space a model may put blanks into its JSON until it runs out of tokens.
_ONE_LINE = {"whitespace_flexible": True, "whitespace_pattern": r"\x20"}
MAX_THOUGHT = 400  # characters: a model that is made to call a tool must get to it


def named_grammar(tool: Tool) -> str:
    """The rest of an answer whose prompt already ends with ``Action Input:`` of this tool."""
    return f"start: input_0\n{_input_rule(0, tool)}"


def required_grammar(tools: Sequence[Tool]) -> str:
    """The rest of an answer whose prompt ends with ``Thought:``: a thought in one line, then a call of any tool."""
    calls = " | ".join(f"call_{number}" for number in range(len(tools)))
    head = f'start: THOUGHT "\\nAction: " ({calls})\nTHOUGHT: /[^\\x00-\\x1f\\x7f]{{0,{MAX_THOUGHT}}}/\n'
    return head + "".join(_call_rules(number, tool) for number, tool in enumerate(tools))


def strict_grammar(tools: Sequence[Tool]) -> str:
    """Any answer, but a call must name a tool, and its input follow the schema if the tool is strict.

    ``head`` is lazy: it ends at the first ``Action: `` that begins a line, where FREE has ended already.
    """
    calls = " | ".join(f"call_{number}" for number in range(len(tools)))
    head = f"start: FREE | head ({calls})\n"
    head += r"head[lazy]: /(?s:(.*\n)?Action: )/ & ~/(?s:(.*\n)?Action:[^ ].*)/" + "\n"
    head += r"FREE: /(?s:.*)/ & ~/(?s:(.*\n)?Action:.*)/" + "\n"
    return head + "".join(_call_rules(n, tool, free=not tool.strict) for n, tool in enumerate(tools))


def _call_rules(number: int, tool: Tool, *, free: bool = False) -> str:
    head = json.dumps(f"{tool.name}\nAction Input:", ensure_ascii=False)
    return f"call_{number}: {head} input_{number}\n{_input_rule(number, tool, free)}"


def _input_rule(number: int, tool: Tool, free: bool = False) -> str:
    """The space after the colon is part of it: the models write it as one token with what follows."""
    if free or tool.args_format == "code":
        return f'input_{number}: " " /(?s:.+)/\n'
    schema = json.dumps({**tool.schema, "x-guidance": _ONE_LINE})
    return f'input_{number}: " " args_{number}\nargs_{number}: %json {schema}\n'
