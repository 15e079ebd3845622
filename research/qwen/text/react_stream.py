"""Reading ReAct answers while they are written: content and tool calls out, markers never.

A marker counts at the start of a line only. Thoughts are held until it is known what they lead to: before a call they
are the content, before a final answer they are dropped. Nothing depends on how the text is cut into pieces.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Final, Literal

from research.qwen.messages import ToolCall, ToolCallDelta

Piece = str | ToolCallDelta
Reason = Literal["stop", "tool_calls"]

THOUGHT: Final = "Thought:"
ACTION: Final = "Action:"
ACTION_INPUT: Final = "Action Input:"
OBSERVATION: Final = "Observation:"
FINAL_ANSWER: Final = "Final Answer:"
MARKERS: Final = (THOUGHT, ACTION, ACTION_INPUT, OBSERVATION, FINAL_ANSWER)
EMPTY_ARGUMENTS: Final = "{}"


class _State(Enum):
    START = auto()  # nothing but white space so far
    THOUGHT = auto()
    NAME = auto()  # in the line of Action:
    PLAIN = auto()  # text that does not follow the format
    ANSWER = auto()  # after Final Answer:
    INPUT = auto()
    DONE = auto()


def new_call_id() -> str:
    """A fresh id, in the form OpenAI clients expect."""
    return f"call_{secrets.token_hex(12)}"


class ReactStream:
    """Turns the text of one answer into pieces of content (str) and of tool calls, as it arrives.

    White space at both ends of content and arguments is dropped. Arguments are passed on as written, valid JSON or
    not; an empty input becomes ``{}``.
    """

    def __init__(
        self,
        prefix: str = "",
        *,
        parallel: bool = True,
        calls: bool = True,
        names: Collection[str] = (),
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """
        Args:
            prefix: what the prompt already put into the assistant's mouth: read, but its content is not repeated.
            parallel: False ends the answer after its first call.
            calls: False drops calls (``tool_choice`` "none").
            names: the tools; a call of one of them that breaks off before its input is not taken for text.
            new_id: makes the ids of calls.
        """
        self._parallel, self._calls, self._names, self._new_id = parallel, calls, frozenset(names), new_id
        self._state = self._before = _State.START
        self._line_start = True
        self._pending = ""  # could still become a marker
        self._held = ""  # the thought
        self._name = ""
        self._space = ""  # white space that comes out only if text follows it
        self._started = False  # content, or arguments of the open call, have begun
        self._index = -1
        self._out: list[Piece] = []
        self._out = [piece for piece in self.feed(prefix) if not isinstance(piece, str)]
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """Take more text; return what is safe to show now."""
        self._pending += text
        while self._pending and self._state is not _State.DONE:
            if self._state is _State.START:
                self._pending = self._pending.lstrip()
            if self._line_start and not self._take_marker():
                if any(marker.startswith(self._pending) for marker in MARKERS):
                    break
                self._line_start = False
            self._take_line()
        return self._taken()

    def finish(self) -> tuple[list[Piece], Reason]:
        """End of the text: return what was held back, and why the answer ended."""
        rest, self._pending = self._pending, ""
        if self._state in (_State.START, _State.PLAIN, _State.ANSWER):
            self._text(rest)  # not a marker after all; elsewhere it is a broken one
        if self._state is _State.NAME:
            self._abandon()
        if self._state is _State.THOUGHT:
            self._emit(self._held.strip())
        self._close_call()
        return self._taken(), "tool_calls" if self._index >= 0 else "stop"

    # ---- cutting into markers and text ----

    def _take_marker(self) -> bool:
        for marker in MARKERS:
            if self._pending.startswith(marker):
                self._pending = self._pending[len(marker) :]
                self._line_start = False
                self._marker(marker)
                return True
        return False

    def _take_line(self) -> None:
        """Hand on text up to and with the next line break."""
        line, newline, rest = self._pending.partition("\n")
        self._pending, self._line_start = rest, bool(newline)
        self._text(line + newline)

    # ---- what they mean ----

    def _marker(self, marker: str) -> None:
        if self._state is _State.NAME:
            if marker == ACTION_INPUT:
                self._open_call()
                return
            self._abandon()
        if self._state is _State.DONE:
            return
        if marker == OBSERVATION or (self._state is _State.INPUT and marker != ACTION):
            self._end()
        elif marker == ACTION:
            self._before, self._state, self._name = self._state, _State.NAME, ""
        elif self._state is _State.ANSWER or (self._state is _State.PLAIN and marker == ACTION_INPUT):
            self._text(marker)
        elif marker == ACTION_INPUT:
            self._end()
        elif marker == FINAL_ANSWER:
            self._state, self._held = _State.ANSWER, ""
        elif marker == THOUGHT:
            self._state = _State.THOUGHT

    def _text(self, text: str) -> None:
        if self._state is _State.NAME:
            # One line only: whatever follows it but its input means that it was no call.
            if "\n" not in self._name or not text.strip():
                self._name += text
                return
            self._abandon()
        if self._state is _State.START and text:
            self._state = _State.PLAIN
        if self._state is _State.THOUGHT:
            self._held += text
        elif self._state is _State.INPUT:
            self._emit(text, self._index)
        elif self._state in (_State.PLAIN, _State.ANSWER):
            self._emit(text)

    def _open_call(self) -> None:
        name = self._name.strip()
        self._close_call()
        if not name or not self._calls or (self._index >= 0 and not self._parallel):
            self._end()
            return
        self._emit(self._held.strip())
        self._held, self._space, self._started = "", "", False
        self._index += 1
        self._state = _State.INPUT
        self._out.append(ToolCallDelta(self._index, id=self._new_id(), name=name))

    def _close_call(self) -> None:
        if self._index >= 0 and not self._started:
            self._out.append(ToolCallDelta(self._index, EMPTY_ARGUMENTS))
            self._started = True

    def _abandon(self) -> None:
        """The line of Action: was no call: text if the answer does not follow the format, else nothing."""
        self._state = self._before
        if self._state is _State.START:
            self._state = _State.THOUGHT
        if self._state in (_State.PLAIN, _State.ANSWER) and self._name.strip() not in self._names:
            self._emit(ACTION + self._name)
        elif self._state is _State.THOUGHT:
            self._held += self._name.partition("\n")[2]  # white space of the next line
        if self._state is _State.INPUT:
            self._end()

    def _end(self) -> None:
        """The model's own part is over; a thought that led nowhere is all there is to show."""
        self._emit(self._held.strip())
        self._held = ""
        self._state = _State.DONE

    # ---- output ----

    def _emit(self, text: str, index: int | None = None) -> None:
        """Put out content, or arguments of call ``index``, without the white space at its ends."""
        body = text.rstrip()
        if not body:
            self._space += text
            return
        shown = self._space + body if self._started else body.lstrip()
        self._space, self._started = text[len(body) :], True
        self._out.append(shown if index is None else ToolCallDelta(index, shown))

    def _taken(self) -> list[Piece]:
        out, self._out = self._out, []
        return out


def parse_answer(
    text: str, prefix: str = "", *, parallel: bool = True
) -> tuple[str | None, tuple[ToolCall, ...]]:
    """Read a whole answer as ``ReactStream`` does: (content, calls); content is None where there are only calls."""
    return collect(ReactStream(prefix, parallel=parallel), text)


def collect(stream: ReactStream, text: str) -> tuple[str | None, tuple[ToolCall, ...]]:
    """Run a whole text through ``stream``: (content, calls)."""
    pieces = [*stream.feed(text), *stream.finish()[0]]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, str):
            continue
        if piece.id is not None:
            calls.append(ToolCall(piece.id, piece.name or "", piece.arguments))
        else:
            last = calls[-1]
            calls[-1] = ToolCall(last.id, last.name, last.arguments + piece.arguments)
    return (content or None if calls else content), tuple(calls)
