"""Batches in an order that depends on seed and epoch alone, so that any step of any process can be found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import ConfigError, DataError
from research.qwen.train.packing import pack
from research.qwen.train.rendering import IGNORE, Sample

PAD_ID: Final = 151643  # <|endoftext|>, as published
PADDING: Final = -1  # segment of what is no token

Ints = NDArray[np.int32]


class Samples(Protocol):
    """What batches need of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample: ...

    def lengths(self) -> Ints:
        """Tokens of every sample, (samples,)."""


@dataclass(frozen=True)
class Batch:
    """Rows of token ids; every array is (B, S) int32 and C-contiguous.

    Attributes:
        ids: token ids; padding is ``<|endoftext|>``.
        labels: aligned with ``ids`` (not shifted); -100 where nothing is learned, in padding and, in packed rows, at
            the first token of every sample.
        positions: place of a token in its sample, from 0; 0 in padding.
        segments: number of the sample in its row, from 0; -1 in padding. A token attends to earlier tokens of its own
            sample only. -2 - n is a token of sample n that others do not attend to, and neither does it to itself
            (``Sample.hidden``): it looks back at what is visible of its sample. See ``attention_mask``. The training
            steps of this project leave such a token out altogether, and learn neither it nor the one after it.
    """

    ids: Ints
    labels: Ints
    positions: Ints
    segments: Ints


def attention_mask(segments: Ints) -> NDArray[np.bool_]:
    """Which token (second axis) attends to which (third): (B, S, S) from ``Batch.segments``.

    A row without any True belongs to padding, or to a hidden token that nothing visible precedes.
    """
    owner = np.where(segments < PADDING, -2 - segments, segments)
    same = owner[:, :, None] == segments[:, None, :]
    earlier = np.tri(segments.shape[1], dtype=np.bool_)
    mask: NDArray[np.bool_] = same & earlier & (segments >= 0)[:, None, :]
    return mask


class Batches:
    """The batches of one of ``world`` processes.

    Step k of an epoch takes the next ``world * batch_size`` rows of its order, and process r the r-th part of them: the
    processes together see what one process with the whole batch size sees. All of them pad to the same length.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        packing: bool = False,
        rank: int = 0,
        world: int = 1,
        pad: Literal["multiple", "max"] = "multiple",
        pad_multiple: int = 64,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_id: int = PAD_ID,
    ) -> None:
        """Look at the length of every sample and, for packing, decide which of them share rows.

        Args:
            batch_size: rows of a batch in this process.
            max_length: tokens of a row at most.
            packing: several samples in a row; which ones depends on the seed, the order of the rows on the epoch too.
            pad: "multiple": rows are as long as the longest of the step needs, rounded up to ``pad_multiple``; "max":
                exactly ``max_length``.
            drop_last: leave out the rows at the end of an epoch that fill no whole step; otherwise the last step is
                filled up with rows of padding.

        Raises:
            ConfigError: a value is out of range.
            DataError: a sample is longer than ``max_length``, there are too few for one step, or as ``Dataset.survey``.
        """
        for name, value in (("batch_size", batch_size), ("world", world), ("pad_multiple", pad_multiple)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if not 0 <= rank < world:
            raise ConfigError(f"rank: expected 0 to {world - 1}, got {rank}")
        if pad not in ("multiple", "max"):
            raise ConfigError(f"pad: unknown value {pad!r}; known are multiple, max")
        self.dataset, self.batch_size, self.max_length, self.seed = dataset, batch_size, max_length, seed
        self.rank, self.world, self.shuffle, self.packing = rank, world, shuffle, packing
        self.pad_multiple = max_length if pad == "max" else pad_multiple
        self.pad_id = pad_id
        self.lengths = dataset.lengths()  # first: it may leave samples out
        self.rows = self._rows()
        per_step = batch_size * world
        self.steps_per_epoch = len(self.rows) // per_step if drop_last else -(-len(self.rows) // per_step)
        if not self.steps_per_epoch:
            raise DataError(
                f"{len(self.rows)} rows are too few for one step of {world} x {batch_size}: lower the batch size, or "
                f"keep incomplete steps (drop_last: false)"
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def padding_share(self) -> float:
        """Part of all rows, filled up to ``max_length``, that is padding."""
        return 1.0 - self.tokens_per_epoch / (len(self.rows) * self.max_length)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` (from 0) from step ``start`` on; nothing before it is read."""
        order = shuffled(len(self.rows), self.seed, number) if self.shuffle else np.arange(len(self.rows))
        per_step = self.batch_size * self.world
        for step in range(start, self.steps_per_epoch):
            taken = [self.rows[n] for n in order[step * per_step : (step + 1) * per_step]]
            longest = max(int(sum(self.lengths[n] for n in row)) for row in taken)
            mine = taken[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield self._batch(mine, self._padded(longest))

    def _rows(self) -> Sequence[Sequence[int]]:
        count = len(self.dataset)
        longest = int(self.lengths.max(initial=0))
        if longest > self.max_length:
            raise DataError(
                f"a sample has {longest} tokens, the rows of a batch {self.max_length}: prepare the data with this "
                f"max_length too"
            )
        if not self.packing:
            return [(n,) for n in range(count)]
        order = shuffled(count, self.seed, -1) if self.shuffle else np.arange(count)
        return pack(self.lengths.tolist(), self.max_length, order.tolist())

    def _padded(self, length: int) -> int:
        return min(-(-max(length, 1) // self.pad_multiple) * self.pad_multiple, self.max_length)

    def _batch(self, rows: Sequence[Sequence[int]], length: int) -> Batch:
        shape = (self.batch_size, length)
        batch = Batch(
            np.full(shape, self.pad_id, np.int32),
            np.full(shape, IGNORE, np.int32),
            np.zeros(shape, np.int32),
            np.full(shape, PADDING, np.int32),
        )
        for n, row in enumerate(rows):
            self._fill(batch, n, [self.dataset[number] for number in row])
        return batch

    def _fill(self, batch: Batch, row: int, samples: Sequence[Sample]) -> None:
        at = 0
        for segment, sample in enumerate(samples):
            size = len(sample.ids)
            here = (row, slice(at, at + size))
            batch.ids[here], batch.labels[here] = sample.ids, sample.labels
            batch.positions[here], batch.segments[here] = np.arange(size), segment
            if self.packing:
                batch.labels[row, at] = IGNORE
            if sample.hidden:
                batch.segments[row, np.array(sample.hidden) + at] = -2 - segment
            at += size


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """A permutation of 0 .. count - 1 that depends on nothing else, and on no version of NumPy.

    Numbers are sorted by their SplitMix64 hash (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014), which is a bijection, so that no two are equal.
    """
    mask = (1 << 64) - 1
    key = _mix(np.array([seed & mask], np.uint64)) ^ np.uint64((epoch * 0x9E3779B97F4A7C15) & mask)
    hashes = _mix(np.arange(count, dtype=np.uint64) ^ _mix(key))
    return np.argsort(hashes, kind="stable")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
