"""Training data: a file of conversations as samples, checked as a whole before training and encoded one at a time.

A dataset holds the places of its records in the file, never their contents.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import DataError, QwenError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.text.vocabulary import StrPath
from research.qwen.train.dataset import Dataset, Progress, Survey
from research.qwen.train.files import LISTED, BrokenFile, Problem, open_binary, pieces
from research.qwen.train.records import dialogues, load_record
from research.qwen.train.rendering import IGNORE, DataOptions, Dialogue, Sample, render

__all__ = ["IGNORE", "DataOptions", "Dataset", "Progress", "Sample", "Survey", "open_dataset"]


class ConversationDataset(Dataset):
    """Samples of a JSON or JSONL file of conversations, whose records are read when a sample is asked for."""

    def __init__(self, path: Path, tokenizer: QwenTokenizer, options: DataOptions, skip_bad: bool) -> None:
        """Read the file once and check every record; see ``open_dataset``."""
        super().__init__(path, tokenizer, options, skip_bad)
        self._stream = open_binary(path)
        self._stamp = _stamp(self._stream)
        # By sample: place, size and line of its record, and which of the record's dialogues it is.
        self._starts, self._sizes = array("q"), array("i")
        self._lines, self._parts = array("i"), array("i")
        try:
            self._index()
        except BaseException:
            self._stream.close()
            raise

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Sample:
        return render(self.dialogue(number), self.tokenizer, self.options)

    def dialogue(self, number: int) -> Dialogue:
        """The turns of one sample. DataError if the file has changed since it was opened."""
        return dialogues(self._record(number), self.options.system)[self._parts[number]]

    def identity(self, number: int) -> str:
        """The ``id`` of its record, "" without one."""
        identity = self._record(number).get("id", "")
        return identity if isinstance(identity, str) else str(identity)

    def _record(self, number: int) -> Any:
        if _stamp(self._stream) != self._stamp:
            raise DataError(f"{self.path} was changed while it was in use; start again")
        return load_record(os.pread(self._stream.fileno(), self._sizes[number], self._starts[number]))

    def line(self, number: int) -> int:
        return self._lines[number]

    def keep(self, numbers: NDArray[np.intp]) -> None:
        for name in ("_starts", "_sizes", "_lines", "_parts"):
            old = getattr(self, name)
            setattr(self, name, array(old.typecode, [old[n] for n in numbers]))

    def _index(self) -> None:
        found: list[Problem] = []
        total = records = 0
        try:
            for piece in pieces(self._stream):
                records += 1
                reason = self._add(piece.start, piece.line, piece.raw)
                if reason:
                    total += 1
                    found += [Problem(piece.line, reason)][: LISTED - len(found)]
        except BrokenFile as error:
            records, total = records + 1, total + 1
            found = [*found[: LISTED - 1], error.problem]
        if not records:
            raise DataError(f"{self.path} is empty: it holds no conversation")
        self._report(found, total, records)

    def _add(self, start: int, line: int, raw: bytes) -> str:
        """Take the samples of one record in; what is wrong with it, or ""."""
        try:
            parts = len(dialogues(load_record(raw), self.options.system))
        except QwenError as error:
            return str(error)
        for part in range(parts):
            self._starts.append(start)
            self._sizes.append(len(raw))
            self._lines.append(line)
            self._parts.append(part)
        return ""


def open_dataset(
    path: StrPath, tokenizer: QwenTokenizer, options: DataOptions | None = None, skip_bad: bool = False
) -> Dataset:
    """Open a data file and check every record in it; nothing is encoded yet.

    Known are JSON (one array) and JSONL (an object a line) with records in the published form, as OpenAI messages or
    as Alpaca, recognised by their keys, and MindRecord (``.mindrecord``), which is encoded already.

    Raises:
        DataError: the file is missing, empty or not what it should be; or, unless ``skip_bad``, it holds bad records:
            the message names line and reason of the first 20 and how many there are.
    """
    options = options or DataOptions()
    if is_mindrecord(Path(path)):
        from research.qwen.train.mindrecord import TokenDataset

        return TokenDataset(Path(path), tokenizer, options, skip_bad)
    return ConversationDataset(Path(path), tokenizer, options, skip_bad)


def is_mindrecord(path: Path) -> bool:
    """Whether a file name is that of a MindRecord file, or of one shard of several."""
    return path.suffix.rstrip("0123456789") == ".mindrecord"


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(stream.fileno())
    return stat.st_size, stat.st_mtime_ns
