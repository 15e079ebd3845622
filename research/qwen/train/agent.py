"""Conversations with tools as training samples, in the wording of the prompts a server would send.

The server puts the tools before the question that is being answered, so in a conversation of several questions no one
text holds every prompt. One record therefore gives one dialogue for each stretch of answers whose prompts are
beginnings of the same text; each answer is learned once, under the very prompt it would be asked with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from research.qwen.messages import Message
from research.qwen.text.react import Tool, plain_turns
from research.qwen.text.react_stream import OBSERVATION, THOUGHT
from research.qwen.train.rendering import Dialogue, Turn, whole_turns

# Stands for the result of a tool while a conversation is rendered; a private-use character no text should hold.
_PLACE: Final = "\ue0f1"

Words = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Answer:
    """One message of the assistant: the turns it is asked with, and those that include it."""

    asked: list[Message]
    turns: list[Message]
    results: dict[int, Words]  # by turn: what tools said
    waits: bool  # ends with a call

    @property
    def place(self) -> int:
        """Number of the turn the answer is in."""
        return len(self.asked) - (self.asked[-1].role == "assistant")

    @property
    def start(self) -> int:
        """Where in its turn the answer begins."""
        return len(self.asked[-1].content) if self.asked[-1].role == "assistant" else 0


def agent_dialogues(messages: Sequence[Message], tools: Sequence[Tool], system: str) -> list[Dialogue]:
    """Return the dialogues of a conversation; ``system`` is its system message if it begins with none.

    Calls and results become ReAct text inside the assistant's turn, contents are trimmed as the server trims them.
    Without tools there is one dialogue. What follows the last answer is left out where there are tools.

    Raises:
        PromptError: a result without a call.
    """
    if not tools:
        return [_without_tools(messages, system)]
    _turns(messages, tools, system)  # also what follows the last answer must be in order
    places = [n for n, message in enumerate(messages) if message.role == "assistant"]
    answers = [_answer(messages, n, tools, system) for n in places]
    found: list[Dialogue] = []
    while answers:
        last = answers.pop()
        group = [last]
        while answers and _begins(answers[-1].asked, last.turns):
            group.insert(0, answers.pop())
        found.insert(0, _dialogue(group))
    return found


def _without_tools(messages: Sequence[Message], system: str) -> Dialogue:
    if not any(message.role == "tool" or message.tool_calls for message in messages):
        return whole_turns(_turns(messages, (), system))
    turns, results = _rendered(messages, (), system)
    dialogue = whole_turns(turns)
    for n, spans in results.items():
        dialogue[n] = replace(dialogue[n], words=_without(0, len(turns[n].content), spans))
    if messages[-1].tool_calls:
        dialogue[-1] = _waiting(dialogue[-1])
    return dialogue


def _answer(messages: Sequence[Message], n: int, tools: Sequence[Tool], system: str) -> _Answer:
    asked = _turns(messages[:n], tools, system)
    turns, results = _rendered(messages[: n + 1], tools, system)
    closed = asked[:-1] if asked[-1].role == "assistant" else asked
    return _Answer(asked, [*closed, turns[-1]], results, bool(messages[n].tool_calls))


def _begins(asked: Sequence[Message], turns: Sequence[Message]) -> bool:
    """Whether a prompt is the beginning of a conversation."""
    if len(asked) > len(turns) or list(asked[:-1]) != list(turns[: len(asked) - 1]):
        return False
    open_, turn = asked[-1], turns[len(asked) - 1]
    if open_.role == "assistant":
        return turn.role == "assistant" and turn.content.startswith(open_.content)
    return open_ == turn


def _dialogue(group: Sequence[_Answer]) -> Dialogue:
    """The turns of the last answer, with the words of all answers of the group."""
    last = group[-1]
    dialogue = [Turn(turn.role, turn.content) for turn in last.turns]
    for answer in reversed(group):  # the first answer in a turn says where its words begin
        turn = dialogue[answer.place]
        words = _without(answer.start, len(turn.content), last.results.get(answer.place, ()))
        dialogue[answer.place] = replace(turn, words=words)
    return [*dialogue[:-1], _waiting(dialogue[-1])] if last.waits else dialogue


def _waiting(turn: Turn) -> Turn:
    """A turn that ends with a call: the answer stops at the observation, which is not its own to write."""
    added = f"\n{OBSERVATION}"
    words = turn.words or ()
    start = words[-1][0] if words else len(turn.content)
    content = turn.content + added
    return Turn(turn.role, content, (*words[:-1], (start, len(content))), closed=False)


def _without(start: int, end: int, spans: Words) -> Words:
    """The characters from ``start`` to ``end`` that are in none of the spans."""
    words = []
    for a, b in spans:
        if a > start:
            words.append((start, a))
        start = max(start, b)
    return (*words, (start, end)) if start < end or not words else tuple(words)


def _turns(
    messages: Sequence[Message], tools: Sequence[Tool], system: str, *, open_end: bool = True
) -> list[Message]:
    """The turns of the server's prompt, with our system message where it would put its own."""
    turns = plain_turns(messages, tools, open_end=open_end)
    return turns if messages[0].role == "system" else [Message("system", system), *turns[1:]]


def _rendered(
    messages: Sequence[Message], tools: Sequence[Tool], system: str
) -> tuple[list[Message], dict[int, Words]]:
    """Turns without an open thought, and where in which turn the results of tools are.

    A result reaches over the thought that the server opens after it.
    """
    mark = _PLACE
    while any(mark in text for m in messages for text in (m.content, *(c.arguments for c in m.tool_calls))):
        mark += _PLACE
    marked = [
        replace(m, content=f"{mark}{n}{mark}") if m.role == "tool" else m for n, m in enumerate(messages)
    ]
    turns = _turns(marked, tools, system, open_end=False)
    found: dict[int, Words] = {}
    for n, turn in enumerate(turns):
        if turn.role == "assistant" and mark in turn.content:
            # Texts and numbers of results by turns; calls may be answered in any order.
            pieces = turn.content.split(mark)
            said = [messages[int(number)].content.lstrip("\n").rstrip() for number in pieces[1::2]]
            content, spans = _filled(pieces[::2], said)
            turns[n], found[n] = replace(turn, content=content), spans
    return turns, found


def _filled(pieces: Sequence[str], results: Sequence[str]) -> tuple[str, Words]:
    """The text with results in the gaps between its pieces, and where they are."""
    content, spans, opened = pieces[0], [], f"\n{THOUGHT}"
    for result, piece in zip(results, pieces[1:], strict=True):
        start = len(content)
        end = start + len(result) + (len(opened) if piece.startswith(opened) else len(piece[:1]))
        spans.append((start, end))
        content += result + piece
    return content, tuple(spans)
