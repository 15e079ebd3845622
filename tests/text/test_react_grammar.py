"""The grammars of demanded calls, run by the library that will run them."""

from __future__ import annotations

from typing import Any

import pytest

from research.qwen.text.react_grammar import MAX_THOUGHT, named_grammar, required_grammar, strict_grammar
from research.qwen.text.react_tools import Tool, tools_from
from research.qwen.text.tokenizer import QwenTokenizer
from tests.text.agent_files import WEATHER

llguidance = pytest.importorskip("llguidance")

(GET_WEATHER,) = tools_from([{"type": "function", "function": {**WEATHER, "strict": True}}])
CODE = Tool("python", args_format="code")
QUOTED = Tool('天气 "now" \\', parameters=[{"name": "x", "required": True, "schema": {"type": "integer"}}])
TOOLS = (GET_WEATHER, CODE, QUOTED)
ENDED, OPEN, REFUSED = "ended", "may end here", "refused"


@pytest.fixture(scope="module")
def matcher_of(tokenizer: QwenTokenizer) -> Any:
    tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]

    class Vocabulary:
        eos_token_id = tokenizer.im_end_id
        bos_token_id = None
        special_token_ids = list(tokenizer.special_tokens.values())

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode())

    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
    return lambda grammar: llguidance.LLMatcher(wrapped, grammar)


def _outcome(matcher: Any, ids: list[int]) -> str:
    assert not matcher.is_error(), matcher.get_error()
    if matcher.try_consume_tokens(ids) < len(ids):
        return REFUSED
    if not matcher.is_accepting():
        return "not yet"
    return ENDED if matcher.is_stopped() else OPEN


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        (GET_WEATHER, ' {"city": "Boston 北京", "unit": "c"}', ENDED),
        (GET_WEATHER, ' {"city": "Boston"', "not yet"),
        (GET_WEATHER, ' {"unit": "c"}', REFUSED),
        (GET_WEATHER, ' {"city": 3}', REFUSED),
        (GET_WEATHER, " Boston", REFUSED),
        (GET_WEATHER, ' { "city" : "x" }', ENDED),
        (GET_WEATHER, ' {  "city": "x"}', REFUSED),  # no room to dawdle
        (GET_WEATHER, ' {\n"city": "x"}', REFUSED),
        (Tool("now"), " {}", ENDED),
        (CODE, " ```py\nprint(1)\n```", OPEN),
        (QUOTED, ' {"x": 12}', ENDED),
    ],
)
def test_named(tokenizer: QwenTokenizer, matcher_of: Any, tool: Tool, text: str, expected: str) -> None:
    assert _outcome(matcher_of(named_grammar(tool)), tokenizer.encode(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' so\nAction: get_weather\nAction Input: {"city": "x"}', ENDED),
        ('\nAction: get_weather\nAction Input: {"city": "x"}', ENDED),
        (' 好\nAction: 天气 "now" \\\nAction Input: {"x": 3}', ENDED),
        (" so\nAction: python\nAction Input: print(1)\nx", OPEN),
        (" so", "not yet"),
        (" so\nAction: other", REFUSED),
        (" so\nFinal Answer: no", REFUSED),
        (" so\x04", REFUSED),
        (" so\nAction: python\nAction Input: x", OPEN),
        ("a " * MAX_THOUGHT, REFUSED),
    ],
)
def test_required(tokenizer: QwenTokenizer, matcher_of: Any, text: str, expected: str) -> None:
    assert _outcome(matcher_of(required_grammar(TOOLS)), tokenizer.encode(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", OPEN),
        ("你好", OPEN),
        ("Thought: so\nFinal Answer: hi\nAction", OPEN),
        ("The line of Action: is text here", OPEN),
        ('Thought: so\nAction: get_weather\nAction Input: {"city": "x"}', ENDED),
        ("Action: python\nAction Input: print(1)", OPEN),
        ('Thought: so\nAction: get_weather\nAction Input: {"town"', REFUSED),
        ("Thought: so\nAction: other", REFUSED),
        ("Thought: so\nAction:python", REFUSED),
        ('Thought: so\nAction: 天气 "now" \\\nAction Input: anything', OPEN),  # not strict
    ],
)
def test_strict(tokenizer: QwenTokenizer, matcher_of: Any, text: str, expected: str) -> None:
    assert _outcome(matcher_of(strict_grammar(TOOLS)), tokenizer.encode(text)) == expected
