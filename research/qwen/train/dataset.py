"""What every set of training samples offers, and what is known once it was read through."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import DataError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.files import LISTED, Problem, describe
from research.qwen.train.rendering import DataOptions, Sample

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
