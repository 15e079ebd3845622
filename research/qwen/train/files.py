"""Where the records of a JSON or JSONL file begin and end, found without holding the file in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import DataError

CHUNK: Final = 1 << 20  # bytes read at a time
MAX_RECORD: Final = 1 << 26  # bytes; what is longer is no record but a file that is not what it should be
LISTED: Final = 20  # problems that are named one by one

_FOREIGN: Final = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "gzip",
}
_UTF8_MARK: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t\r\n"
_OPENING: Final = re.compile(rb"\[[ \t\r\n]*")
_COMMA: Final = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_TOO_LONG: Final = (
    f"a record of more than {MAX_RECORD >> 20} MiB begins here; give one object a line, or one array"
)


@dataclass(frozen=True)
class Problem:
    """What is wrong with the record that begins in ``line`` (from 1; 0 where a file has no lines)."""

    line: int
    reason: str


@dataclass(frozen=True)
class Piece:
    """Bytes of one record: where they begin in the file, and in which line."""

    start: int
    line: int
    raw: bytes


class BrokenFile(Exception):
    """From here on the file cannot be divided into records."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.problem = Problem(line, reason)


def describe(path: Path, problems: Sequence[Problem], total: int, records: int) -> str:
    """The message of a DataError: the first problems, one a line, and how many there are of how many records."""
    lines = [f"{path}:{p.line}: {p.reason}" if p.line else f"{path}: {p.reason}" for p in problems[:LISTED]]
    if total > len(lines):
        lines.append(f"... and {total - len(lines)} more")
    if total == 1:
        return lines[0]
    return "\n".join([f"{total} of {records} records cannot be used", *lines])


def open_binary(path: Path) -> BinaryIO:
    """Open a data file; DataError if it is missing, unreadable or empty."""
    try:
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; give a file of conversations (.json, .jsonl or .mindrecord)"
            )
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    if os.fstat(stream.fileno()).st_size == 0:
        stream.close()
        raise DataError(f"{path} is empty: it holds no conversation")
    return stream


def pieces(stream: BinaryIO) -> Iterator[Piece]:
    """The records of a file: the elements of one JSON array, or one object a line.

    Raises:
        BrokenFile: the file is no UTF-8 text, or breaks off; what came before it is whole.
    """
    start, line, first = _first_byte(stream)
    stream.seek(start)
    if first == b"[":
        yield from _Array(stream, start, line).elements()
    elif first:
        yield from _lines(stream, start, line)


def _first_byte(stream: BinaryIO) -> tuple[int, int, bytes]:
    """(offset, line, byte) of the first one that is not white space."""
    head = stream.read(CHUNK)
    for mark, name in _FOREIGN.items():
        if head.startswith(mark):
            raise BrokenFile(1, f"the file is {name}; save it as UTF-8 text")
    base, line = 0, 1
    blank = _UTF8_MARK if head.startswith(_UTF8_MARK) else b""
    while head:
        rest = head.removeprefix(blank).lstrip(_BLANK)
        skipped = len(head) - len(rest)
        line += head.count(b"\n", 0, skipped)
        if rest:
            return base + skipped, line, rest[:1]
        base, head, blank = base + len(head), stream.read(CHUNK), b""
    return base, line, b""


def _lines(stream: BinaryIO, at: int, line: int) -> Iterator[Piece]:
    while raw := stream.readline(MAX_RECORD + 1):
        if len(raw) > MAX_RECORD:
            raise BrokenFile(line, _TOO_LONG)
        text = raw.strip(_BLANK)
        if text:
            yield Piece(at + raw.index(text[:1]), line, text)
        at, line = at + len(raw), line + 1


class _Array:
    """Cuts one JSON array into its elements by counting brackets outside of texts, a chunk at a time."""

    def __init__(self, stream: BinaryIO, start: int, line: int) -> None:
        self.stream = stream
        self.buffer = b""  # what is read and not yet given out
        self.base, self.line = start, line  # of buffer[0]
        self.newlines = np.zeros(0, np.intp)  # places in the buffer
        self.depth, self.in_text, self.escaped = 0, False, False
        self.open: list[int] = []  # place of the element that is not closed yet
        self.closed, self.torn = -1, -1  # place of the closing bracket; of a line break inside a text

    def elements(self) -> Iterator[Piece]:
        """Every element with its place. BrokenFile where the array breaks off."""
        between = _OPENING
        while chunk := self.stream.read(CHUNK):
            ends = self._scan(chunk)
            at = 0
            for start, end in zip(self.open, ends, strict=False):
                self._check(between, at, start)
                yield Piece(self.base + start, self._line_of(start), self.buffer[start:end])
                between, at = _COMMA, end
            del self.open[: len(ends)]
            if self.torn >= 0:
                raise self._torn()
            if self.closed >= 0:
                self._check_end(between, at)
                return
            self._drop(at)
        raise self._breaks_off()

    def _scan(self, chunk: bytes) -> list[int]:
        """Take a chunk in: new places in ``open``, ``newlines``, ``closed``, ``torn``; returns the ends of elements."""
        old = len(self.buffer)
        self.buffer += chunk
        bytes_ = np.frombuffer(chunk, np.uint8)
        quotes = self._quotes(bytes_)
        newlines = np.flatnonzero(bytes_ == 10)
        brackets = _brackets(bytes_)
        torn = newlines[self._inside(quotes, newlines)]
        brackets = brackets[~self._inside(quotes, brackets)]
        self.newlines = np.concatenate([self.newlines, newlines + old])
        self.in_text ^= bool(len(quotes) & 1)
        if torn.size:
            self.torn = old + int(torn[0])
            brackets = brackets[brackets < torn[0]]
        opening = (bytes_[brackets] & 2) != 0  # [ { are 0x5b 0x7b, ] } are 0x5d 0x7d
        depth = self.depth + np.cumsum(np.where(opening, 1, -1))
        over = np.flatnonzero(depth == 0)
        if over.size:
            self.closed = old + int(brackets[over[0]])
            brackets, opening, depth = (values[: over[0]] for values in (brackets, opening, depth))
        self.depth = int(depth[-1]) if depth.size else self.depth
        self.open += (brackets[opening & (depth == 2)] + old).tolist()
        ends: list[int] = (brackets[~opening & (depth == 1)] + old + 1).tolist()
        return ends

    def _quotes(self, chunk: NDArray[np.uint8]) -> NDArray[np.intp]:
        """Places of the quotes that are not escaped; remembers whether the chunk ends with an escape."""
        is_quote = chunk == 34
        slashes = np.flatnonzero(chunk == 92)
        escaped = np.zeros(0, np.intp)
        if slashes.size:
            edge = np.flatnonzero(np.diff(slashes) != 1)
            first, last = slashes[np.r_[0, edge + 1]], slashes[np.r_[edge, len(slashes) - 1]]
            length = last - first + 1
            if self.escaped and first[0] == 0:
                length[0] -= 1  # the first backslash is itself escaped
            escaped = last[length % 2 == 1] + 1
        if self.escaped and not (slashes.size and slashes[0] == 0):
            is_quote[0] = False
        self.escaped = bool(escaped.size and escaped[-1] == len(chunk))
        is_quote[escaped[: len(escaped) - self.escaped]] = False
        return np.flatnonzero(is_quote)

    def _inside(self, quotes: NDArray[np.intp], places: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which places of the chunk lie inside texts."""
        return (np.searchsorted(quotes, places) + self.in_text) % 2 == 1

    def _line_of(self, place: int) -> int:
        return self.line + int(np.searchsorted(self.newlines, place))

    def _drop(self, at: int) -> None:
        """Forget what lies before ``at``."""
        self.line = self._line_of(at)
        self.newlines = self.newlines[self.newlines >= at] - at
        self.open = [place - at for place in self.open]
        self.base, self.buffer = self.base + at, self.buffer[at:]
        if len(self.buffer) > MAX_RECORD:
            raise BrokenFile(self._line_of(self.open[0] if self.open else 0), _TOO_LONG)

    def _check(self, between: re.Pattern[bytes], at: int, start: int) -> None:
        """What stands before an element is what should stand there."""
        if between.fullmatch(self.buffer, at, start) is None:
            where, shown = self._shown(at, start)
            want = "a record in {}" if between is _OPENING else "a comma between records"
            raise BrokenFile(where, f"broken JSON: expected {want}, found {shown}")

    def _check_end(self, between: re.Pattern[bytes], at: int) -> None:
        """Nothing but white space before and after the closing bracket."""
        gap = self.buffer[at : self.closed].removeprefix(b"[" if between is _OPENING else b"")
        if gap.strip(_BLANK) == b",":
            line = self._line_of(at + self.buffer[at:].index(b","))
            raise BrokenFile(line, "broken JSON: a comma before the closing ] of the array; remove it")
        if gap.strip(_BLANK):
            where, shown = self._shown(at, self.closed)
            raise BrokenFile(where, f"broken JSON: expected a record in {{}}, found {shown}")
        line, rest = self._line_of(self.closed), self.buffer[self.closed + 1 :]
        while rest:
            if rest.strip(_BLANK):
                raise BrokenFile(
                    line, f"broken JSON: {_quoted(rest.strip(_BLANK))} after the end of the array"
                )
            rest = self.stream.read(CHUNK)

    def _shown(self, at: int, end: int) -> tuple[int, str]:
        """(line, text) of the first thing between two places that does not belong there."""
        gap = self.buffer[at:end]
        rest = gap.lstrip(_BLANK + b"[,")
        return self._line_of(end - len(rest)), _quoted(rest) if rest else "no comma" if gap else "nothing"

    def _torn(self) -> BrokenFile:
        begun = f" of the record that begins in line {self._line_of(self.open[0])}" if self.open else ""
        what = f"broken JSON: a line break inside a text{begun}; its closing quote is missing"
        return BrokenFile(self._line_of(self.torn), what)

    def _breaks_off(self) -> BrokenFile:
        if self.open:
            what = "the file ends inside the record that begins here; it is cut off, or a quote is missing"
            return BrokenFile(self._line_of(self.open[0]), f"broken JSON: {what}")
        what = "the file ends inside the array, its closing ] is missing"
        return BrokenFile(self._line_of(len(self.buffer)), f"broken JSON: {what}")


def _brackets(chunk: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Places of square brackets and braces, which differ in bit 5."""
    lowered = chunk | 0x20
    return np.flatnonzero((lowered == 0x7B) | (lowered == 0x7D))


def _quoted(raw: bytes) -> str:
    return repr(raw[:12].split(b"\n")[0].decode("utf-8", "replace"))
