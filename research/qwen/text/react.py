"""Qwen's ReAct use of tools: requests with tools become plain turns, and answers become content and tool calls.

The prompt equals that of the published server; docs/tools.md has the format and every deliberate difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from research.qwen.errors import PromptError
from research.qwen.messages import Message, ToolCall
from research.qwen.text import chatml
from research.qwen.text.react_grammar import named_grammar, required_grammar, strict_grammar
from research.qwen.text.react_stream import (
    ACTION,
    ACTION_INPUT,
    FINAL_ANSWER,
    OBSERVATION,
    THOUGHT,
    Piece,
    ReactStream,
    collect,
    parse_answer,
)
from research.qwen.text.react_tools import Tool, ToolChoice, instruction, tools_from
from research.qwen.text.tokenizer import QwenTokenizer

__all__ = [
    "Piece",
    "ReactStream",
    "Tool",
    "ToolChoice",
    "ToolPrompt",
    "build_prompt",
    "parse_answer",
    "plain_turns",
    "tools_from",
]

STOP: Final = (OBSERVATION,)
STOP_BEFORE_CALL: Final = (OBSERVATION, f"\n{ACTION}")
KNOWN: Final = f"{THOUGHT} I now know the final answer.\n{FINAL_ANSWER} "


@dataclass(frozen=True)
class ToolPrompt:
    """A prompt ready for the model, and how to read the answer.

    Attributes:
        messages: plain turns; an open last one (``continued``) is the assistant's and goes on.
        ids: token ids of the whole prompt, ``prefix`` included.
        prefix: how the assistant's answer begins already, as far as reading the rest of it needs to know.
        stop: stop strings that belong to the format; the request's own come on top.
        grammar: llguidance lark text that the answer must follow, or None.
        plain: nothing of ReAct is involved; the answer is the text as it comes.
        continued: the answer goes on with text that is there already.
    """

    messages: list[Message]
    ids: list[int]
    prefix: str = ""
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    plain: bool = True
    continued: bool = False
    parallel: bool = True
    tools: tuple[Tool, ...] = ()

    def stream(self) -> ReactStream:
        """A reader for one choice of the answer (not for ``plain`` prompts, whose text needs none)."""
        names = [tool.name for tool in self.tools]
        return ReactStream(self.prefix, parallel=self.parallel, calls=bool(self.tools), names=names)

    def parse(self, text: str) -> tuple[str | None, tuple[ToolCall, ...]]:
        """Read a whole answer: (content, calls)."""
        return (text, ()) if self.plain else collect(self.stream(), text)


def build_prompt(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    choice: ToolChoice,
    tokenizer: QwenTokenizer,
    *,
    parallel: bool = True,
    add_generation_prompt: bool = True,
    continue_final: bool | None = None,
) -> ToolPrompt:
    """Build the prompt of a chat request, with or without tools.

    Args:
        messages: the conversation; calls and their results are in ``tool_calls`` and messages of role "tool".
        parallel: whether an answer may hold several calls.
        add_generation_prompt: False renders the turns only.
        continue_final: whether the answer goes on with a last message of the assistant. None does so, as the
            published server; False begins a new turn; True demands such a message. After results of tools the
            answer always goes on.
    Raises:
        PromptError: no user message, a result without a call, an unknown role, or nothing to continue.
    """
    shown = () if choice.kind == "none" else tuple(tools)
    turns = plain_turns(messages, shown, open_end=add_generation_prompt)
    react = bool(shown) or any(m.tool_calls or m.role == "tool" for m in messages)
    if not add_generation_prompt:
        return ToolPrompt(
            turns, chatml.render(turns, tokenizer, add_generation_prompt=False), plain=not react
        )
    answering = messages[-1].role == "tool"
    if continue_final and turns[-1].role != "assistant":
        raise PromptError("continue_final: the last message is not the assistant's")
    goes_on = answering or (turns[-1].role == "assistant" and continue_final is not False)
    begun, prefix, grammar = _demand(choice, shown) if react and _free(messages, goes_on) else ("", "", None)
    if answering:
        begun, prefix = begun.removeprefix(THOUGHT), begun or THOUGHT
    elif goes_on and react:
        prefix = _assistant_text(messages[-1], [], len(messages) - 1, bool(shown))
    turns, ids = _open_turn(turns, begun, goes_on, tokenizer)
    return ToolPrompt(
        turns,
        ids,
        prefix,
        (STOP if shown else STOP_BEFORE_CALL) if react else (),
        grammar,
        not react,
        goes_on,
        parallel,
        shown,
    )


def plain_turns(
    messages: Sequence[Message], tools: Sequence[Tool] = (), *, open_end: bool = True
) -> list[Message]:
    """Return the conversation as turns without calls, in the wording of the published server.

    Calls, results and answers become ReAct text of one assistant turn; the tools stand before the question that the
    last assistant turn answers, or before the only one. ``open_end`` opens the next thought after a last result.

    Raises:
        PromptError: no user message, or a result without a call.
    """
    if not any(message.role == "user" for message in messages):
        raise PromptError("messages: there must be at least one user message")
    turns: list[Message] = []
    if messages[0].role != "system":
        turns.append(Message("system", chatml.DEFAULT_SYSTEM))
    position = 0
    while position < len(messages):
        message = messages[position]
        results = _results(messages, position + 1) if message.role == "assistant" else []
        if message.role == "tool":
            raise PromptError(f"messages[{position}]: the result of a tool must follow an assistant message")
        if message.role == "assistant":
            _say(turns, _assistant_text(message, results, position, bool(tools)))
        else:
            turns.append(replace(message, content=_trim(message.content)))
        position += 1 + len(results)
    if messages[-1].role == "tool" and open_end:
        turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{THOUGHT}")
    return _instruct(turns, tools) if tools else turns


def _trim(text: str) -> str:
    return text.lstrip("\n").rstrip()


def _results(messages: Sequence[Message], start: int) -> list[Message]:
    end = start
    while end < len(messages) and messages[end].role == "tool":
        end += 1
    return list(messages[start:end])


def _say(turns: list[Message], text: str) -> None:
    """Add to the assistant's turn, or begin one."""
    if turns[-1].role == "assistant":
        turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{text}")
    else:
        turns.append(Message("assistant", text))


def _assistant_text(message: Message, results: list[Message], position: int, with_tools: bool) -> str:
    """One assistant message with the results that follow it, as ReAct text."""
    content = _trim(message.content)
    if not message.tool_calls:
        text = _trim(f"{KNOWN}{content}" if with_tools else content)
        return text + "".join(_observed(result) for result in results)
    answers = _assign(message.tool_calls, results, position)
    steps: list[str] = []
    for number, (call, answer) in enumerate(zip(message.tool_calls, answers, strict=True)):
        thought = content if number == 0 else ""
        if not thought.startswith(THOUGHT):
            thought = f"{THOUGHT} {thought}"
        step = _trim(f"{thought}\n{ACTION} {call.name}\n{ACTION_INPUT} {call.arguments}")
        steps.append(step + (_observed(answer) if answer else ""))
    return "\n".join(steps)


def _observed(result: Message) -> str:
    return f"\n{OBSERVATION} {_trim(result.content)}"


def _assign(calls: Sequence[ToolCall], results: list[Message], position: int) -> list[Message | None]:
    """The result of each call: by id, or in order where a result has none."""
    answers: list[Message | None] = [None] * len(calls)
    for offset, result in enumerate(results, position + 1):
        wanted = [
            n
            for n, call in enumerate(calls)
            if answers[n] is None and result.tool_call_id in (None, "", call.id)
        ]
        if not wanted:
            what = f"tool_call_id {result.tool_call_id!r}" if result.tool_call_id else "this result"
            raise PromptError(
                f"messages[{offset}]: {what} answers no open call of the assistant message before it"
            )
        answers[wanted[0]] = result
    return answers


def _instruct(turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """Put the tools before the question of the last assistant turn, or before the last question if none."""
    answered = [
        n for n in range(1, len(turns)) if turns[n].role == "assistant" and turns[n - 1].role == "user"
    ]
    asked = [n for n, turn in enumerate(turns) if turn.role == "user"]
    place = answered[-1] - 1 if answered else asked[-1]
    question = f"{instruction(tools)}\n\nQuestion: {turns[place].content}"
    return [*turns[:place], replace(turns[place], content=question), *turns[place + 1 :]]


def _free(messages: Sequence[Message], goes_on: bool) -> bool:
    """Whether the answer's beginning is still ours to choose: not in the middle of a given text."""
    return not goes_on or messages[-1].role == "tool"


def _demand(choice: ToolChoice, tools: Sequence[Tool]) -> tuple[str, str, str | None]:
    """(text that begins the answer, the same for reading it, grammar of the rest) for this choice."""
    if choice.kind == "named":
        tool = next(tool for tool in tools if tool.name == choice.name)
        begun = f"{THOUGHT} I need to call {tool.name}.\n{ACTION} {tool.name}\n{ACTION_INPUT}"
        return begun, begun, named_grammar(tool)
    if choice.kind == "required":
        return THOUGHT, THOUGHT, required_grammar(tools)
    return "", "", strict_grammar(tools) if any(tool.strict for tool in tools) else None


def _open_turn(
    turns: list[Message], begun: str, goes_on: bool, tokenizer: QwenTokenizer
) -> tuple[list[Message], list[int]]:
    """The turns with the open answer, if it has begun, and the ids of the prompt."""
    text = (turns[-1].content if goes_on else "") + begun
    closed = turns[:-1] if goes_on else turns
    ids = chatml.render(closed, tokenizer) + tokenizer.encode(text)
    return ([*closed, Message("assistant", text)] if text else closed), ids
