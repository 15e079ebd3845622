"""The interface of the published ReAct example: pairs of texts in, one prompt text out, the last call of an answer.

For programs written against it; new ones use ``react.build_prompt``, which keeps control tokens in texts harmless.
"""

from __future__ import annotations

from collections.abc import Sequence

from research.qwen.messages import Message
from research.qwen.text import chatml
from research.qwen.text.react_stream import ACTION, ACTION_INPUT, OBSERVATION
from research.qwen.text.react_tools import Tool, instruction


def classic_prompt(history: Sequence[Sequence[str]], tools: Sequence[Tool]) -> str:
    """The prompt of (question, answer) pairs, the last answer begun or empty.

    The tools, with how to write their arguments, stand before the last question but one, or before the only one.
    """
    turns = [Message("system", chatml.DEFAULT_SYSTEM)]
    place = len(history) - 2 if len(history) > 1 else 0
    for number, (question, answer) in enumerate(history):
        if tools and number == place:
            question = f"{instruction(tools, hints=True)}\n\nQuestion: {question}"
        turns += [Message("user", _trim(question)), Message("assistant", _trim(answer))]
    return chatml.render_text(turns[:-1]) + turns[-1].content


def latest_call(text: str) -> tuple[str, str, str]:
    """The last call of an answer: (tool, input, text up to the observation); two empty texts if there is none."""
    action, given, observed = (text.rfind(f"\n{marker}") for marker in (ACTION, ACTION_INPUT, OBSERVATION))
    if not 0 <= action < given:
        return "", "", text
    if observed < given:
        text = text.rstrip()
        observed = len(text)
    name = text[action + len(ACTION) + 1 : given].strip()
    return name, text[given + len(ACTION_INPUT) + 1 : observed].strip(), text[:observed]


def _trim(text: str) -> str:
    return text.lstrip("\n").rstrip()
