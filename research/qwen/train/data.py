"""Training data: a file of conversations as samples, checked as a whole before training and encoded one at a time.

A dataset holds the places of its records in the file, never their contents.
"""

from __future__ import annotations

import abc
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import DataError, QwenError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.text.vocabulary import StrPath
from research.qwen.train.files import LISTED, BrokenFile, Problem, describe, open_binary, pieces
from research.qwen.train.records import dialogues, load_record
from research.qwen.train.rendering import IGNORE, DataOptions, Dialogue, Sample, render

__all__ = ["IGNORE", "DataOptions", "Dataset", "Sample", "Survey", "open_dataset"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Survey:
    """What is in a dataset, counted by encoding every sample once.

    Attributes:
        lengths: (samples,) int32, tokens of each sample as it is trained on.
        trained: (samples,) int32, how many of them are learned.
        cut: samples longer than the window, which were shortened.
        silent: of these, samples of which no word of an answer is left.
        longest: tokens of the longest sample before shortening.
        skipped: bad records that were left out.
    """

    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    cut: int
    silent: int
    longest: int
    skipped: int

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def trained_tokens(self) -> int:
        """Tokens of one epoch that are learned."""
        return int(self.trained.sum(dtype=np.int64))

    def warnings(self, options: DataOptions) -> list[str]:
        """What the user should know before training, a sentence each."""
        found = []
        if self.skipped:
            found.append(f"bad records left out: {self.skipped}")
        if self.cut:
            how = "cut at its end" if options.truncation == "published" else "shortened by whole turns"
            found.append(
                f"{self.cut} of {len(self.lengths)} samples have more than {options.max_length} tokens (the longest "
                f"{self.longest}); each is {how}"
            )
        if self.silent:
            found.append(
                f"in {self.silent} of these nothing of an answer is left: raise max_length, or use truncation: turns"
            )
        return found


class Dataset(abc.ABC):
    """Samples by number, from 0. ``options`` says how they are made."""

    def __init__(self, path: Path, tokenizer: QwenTokenizer, options: DataOptions, skip_bad: bool) -> None:
        self.path, self.tokenizer, self.options, self.skip_bad = path, tokenizer, options, skip_bad
        self.skipped = 0  # bad records left out so far
        self.problems: list[Problem] = []  # the first of them
        self._survey: Survey | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, number: int) -> Sample:
        """Encode one sample."""

    @abc.abstractmethod
    def line(self, number: int) -> int:
        """The line its record begins in; 0 if the file has none."""

    @abc.abstractmethod
    def keep(self, numbers: NDArray[np.intp]) -> None:
        """Drop all other samples."""

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every sample, (samples,) int32; encodes all of them the first time, as ``survey`` does.

        Raises:
            DataError: as ``survey``.
        """
        return self.survey().lengths

    def survey(self, progress: Progress | None = None) -> Survey:
        """Encode every sample once and count; ``progress`` is told (done, of how many).

        Samples without anything to learn are dropped if bad records are to be skipped.

        Raises:
            DataError: a sample has nothing to learn in it, or no sample is left.
        """
        if self._survey is None:
            self._survey = self._count(progress)
        return self._survey

    def _count(self, progress: Progress | None) -> Survey:
        total = len(self)
        table = np.zeros((total, 2), np.int32)
        cut = silent = longest = 0
        useless: list[int] = []
        for number in range(total):
            sample = self[number]
            table[number] = len(sample.ids), sample.trained
            longest = max(longest, sample.full)
            if not sample.trained:
                useless.append(number)
            elif sample.full > len(sample.ids):
                cut += 1
                silent += sample.answer == 0
            if progress and (number % 256 == 255 or number + 1 == total):
                progress(number + 1, total)
        if useless:
            table = self._without(useless, table)
        return Survey(table[:, 0].copy(), table[:, 1].copy(), cut, silent, longest, self.skipped)

    def _without(self, useless: list[int], table: NDArray[np.int32]) -> NDArray[np.int32]:
        room = self.options.max_length
        found = []
        for number in useless[:LISTED]:
            full = self[number].full
            long = f": it has {full} tokens, and none of the {room} that fit is learned; raise max_length"
            found.append(
                self._problem(number, f"nothing to learn in this sample{long if full > room else ''}")
            )
        self._report(found, len(useless), len(self))
        kept = np.setdiff1d(np.arange(len(self)), useless)
        self.keep(kept)
        return table[kept]

    def _problem(self, number: int, reason: str) -> Problem:
        return Problem(self.line(number), reason)

    def _report(self, problems: list[Problem], total: int, records: int) -> None:
        """Raise for bad records, or count them; DataError in any case if nothing is left."""
        if total and not self.skip_bad:
            raise DataError(describe(self.path, problems, total, records))
        if total >= records:
            raise DataError(f"no record can be used: {describe(self.path, problems, total, records)}")
        self.skipped += total
        self.problems = (self.problems + problems)[:LISTED]


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
