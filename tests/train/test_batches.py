"""Batches: what each array holds, an order that can be found again, and processes that share it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import ConfigError, DataError
from research.qwen.train.batches import Batch, Batches, attention_mask, shuffled
from research.qwen.train.data import IGNORE, Sample

MAX = 48
PAD = 151643


class Numbers:
    """Samples whose ids tell which sample and token they are; counts what is read."""

    def __init__(self, lengths: list[int], hidden: dict[int, tuple[int, ...]] | None = None) -> None:
        self.sizes, self.hidden = lengths, hidden or {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> Sample:
        self.read.append(number)
        ids = [number * 1000 + n for n in range(self.sizes[number])]
        return Sample(ids, [i if i % 3 else IGNORE for i in ids], self.hidden.get(number, ()))

    def lengths(self) -> np.ndarray:
        return np.array(self.sizes, np.int32)


def samples_of(batches: list[Batch]) -> list[list[int]]:
    """The samples of batches in the order they come, as lists of ids; checks every array on the way."""
    found = []
    for batch in batches:
        for array in (batch.ids, batch.labels, batch.positions, batch.segments):
            assert array.dtype == np.int32 and array.flags.c_contiguous and array.shape == batch.ids.shape
        padding = batch.segments == -1
        assert (batch.ids[padding] == PAD).all() and (batch.labels[padding] == IGNORE).all()
        assert (batch.positions[padding] == 0).all()
        for ids, positions, segments in zip(batch.ids, batch.positions, batch.segments, strict=True):
            used = int((segments >= 0).sum())
            assert (segments[:used] >= 0).all() and (np.diff(segments[:used]) >= 0).all()
            for segment in range(int(segments.max(initial=-1)) + 1):
                here = segments == segment
                assert positions[here].tolist() == list(range(int(here.sum())))
                found.append(ids[here].tolist())
    return found


def made(lengths: list[int], size: int = 2, **options: Any) -> Batches:
    return Batches(Numbers(lengths), size, options.pop("max_length", MAX), **options)


LENGTHS = st.lists(st.integers(1, MAX), min_size=1, max_size=25)
COMMON = {
    "lengths": LENGTHS,
    "size": st.integers(1, 4),
    "seed": st.integers(0, 2**64),
    "packing": st.booleans(),
    "epoch": st.integers(0, 5),
}


def equal(one: Batch, other: Batch) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("ids", "labels", "positions", "segments")
    )


@given(**COMMON, shuffle=st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_sample_once_and_whole(
    lengths: list[int], size: int, seed: int, packing: bool, epoch: int, shuffle: bool
) -> None:
    batches = made(lengths, size, seed=seed, packing=packing, shuffle=shuffle)
    steps = list(batches.epoch(epoch))
    found = samples_of(steps)
    assert sorted(found) == [Numbers(lengths)[n].ids for n in range(len(lengths))]
    assert len(steps) == batches.steps_per_epoch
    assert shuffle or packing or found == sorted(found)


@given(**COMMON, world=st.integers(1, 3), drop=st.booleans())
@settings(max_examples=40, deadline=None)
def test_processes_together_see_what_one_would(
    lengths: list[int], size: int, seed: int, packing: bool, epoch: int, world: int, drop: bool
) -> None:
    options = {"seed": seed, "packing": packing, "drop_last": drop}
    try:
        one = made(lengths, size * world, **options)
    except DataError:
        with pytest.raises(DataError, match="too few for one step"):
            made(lengths, size, rank=0, world=world, **options)
        return
    many = [
        list(made(lengths, size, rank=rank, world=world, **options).epoch(epoch)) for rank in range(world)
    ]
    for whole, *parts in zip(one.epoch(epoch), *many, strict=True):
        joined = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "labels", "positions", "segments")
        )
        assert equal(whole, Batch(*joined))


@given(**COMMON, start=st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_resuming_gives_the_same_batches_and_reads_nothing_before(
    lengths: list[int], size: int, seed: int, packing: bool, epoch: int, start: int
) -> None:
    whole = list(made(lengths, size, seed=seed, packing=packing).epoch(epoch))
    dataset = Numbers(lengths)
    rest = list(Batches(dataset, size, MAX, seed=seed, packing=packing).epoch(epoch, start))
    assert len(rest) == max(len(whole) - start, 0)
    assert all(equal(one, other) for one, other in zip(whole[start:], rest, strict=True))
    assert sorted(dataset.read) == sorted(ids[0] // 1000 for ids in samples_of(rest))


def test_order_changes_with_seed_and_epoch_only() -> None:
    lengths = [5] * 40
    orders = {
        (seed, epoch): tuple(ids[0] for ids in samples_of(list(made(lengths, seed=seed).epoch(epoch))))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(ids[0] for ids in samples_of(list(made(lengths, seed=1).epoch(2))))
    # Written down: another order would make runs of earlier versions impossible to resume.
    assert shuffled(8, 0, 0).tolist() == SHUFFLED


SHUFFLED = [0, 1, 6, 3, 5, 4, 2, 7]


def test_shuffling_is_even() -> None:
    places = np.array([shuffled(10, seed, 1) for seed in range(2000)])
    counts = np.array([np.bincount(column, minlength=10) for column in places.T])
    assert counts.min() > 140 and counts.max() < 260


def test_packed_rows_restart_positions_and_do_not_learn_first_tokens() -> None:
    (batch,) = made([10, 12, 9], 1, packing=True, shuffle=False).epoch(0)
    assert batch.segments[0].tolist() == [0] * 10 + [1] * 12 + [2] * 9 + [-1] * 17
    assert batch.positions[0, 8:13].tolist() == [8, 9, 0, 1, 2]
    plain = [label for n in range(3) for label in [IGNORE, *Numbers([10, 12, 9])[n].labels[1:]]]
    assert batch.labels[0, :31].tolist() == plain
    assert batch.labels[0, 10] == IGNORE != Numbers([10, 12, 9])[1].labels[0]


def test_unpacked_rows_are_segment_zero_with_labels_as_they_are() -> None:
    (batch,) = made([4, 6], 2, shuffle=False).epoch(0)
    assert batch.segments[:, :7].tolist() == [[0] * 4 + [-1] * 3, [0] * 6 + [-1]]
    assert batch.labels[1, :6].tolist() == Numbers([4, 6])[1].labels


def test_length_of_rows() -> None:
    def widths(**options: Any) -> list[int]:
        return [batch.ids.shape[1] for batch in made([3, 17, 40, 47], 1, shuffle=False, **options).epoch(0)]

    assert widths(pad_multiple=8) == [8, 24, 40, 48]
    assert widths(pad_multiple=32) == [32, 32, 48, 48]
    assert widths() == [48] * 4  # never longer than max_length
    assert widths(pad="max") == [48] * 4
    # All processes pad to the longest row of the step, also those whose own rows are short.
    ranks = [list(made([3, 40], 1, shuffle=False, pad_multiple=8, rank=r, world=2).epoch(0)) for r in (0, 1)]
    assert [part[0].ids.shape for part in ranks] == [(1, 40)] * 2


def test_the_last_step_is_filled_up_or_left_out() -> None:
    assert made([5] * 7, 2).steps_per_epoch == 4
    last = list(made([5] * 7, 2).epoch(0))[-1]
    assert last.ids.shape[0] == 2 and (last.segments[1] == -1).all()
    dropped = made([5] * 7, 2, drop_last=True)
    assert dropped.steps_per_epoch == len(list(dropped.epoch(3))) == 3
    empty = list(made([5] * 7, 2, rank=2, world=3).epoch(0))[-1]
    assert (empty.segments == -1).all() and (empty.labels == IGNORE).all()


def test_hidden_tokens_are_marked_and_seen_by_nobody() -> None:
    dataset = Numbers([4, 3], hidden={0: (1,), 1: (0,)})
    (batch,) = Batches(dataset, 1, 8, packing=True, shuffle=False).epoch(0)
    assert batch.segments.tolist() == [[0, -2, 0, 0, -3, 1, 1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    mask = attention_mask(batch.segments)[0].astype(int).tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_packing_fills_rows() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 300, 3000)]
    packed = Batches(Numbers(lengths), 4, 2048, packing=True)
    assert packed.padding_share < 0.02
    assert packed.tokens_per_epoch == sum(lengths)
    first = next(iter(packed.epoch(0)))
    assert (first.segments.max(axis=1) > 3).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "batch_size: expected at least 1, got 0"),
        ({"world": 0}, "world: expected at least 1"),
        ({"rank": 2, "world": 2}, "rank: expected 0 to 1, got 2"),
        ({"pad": "min"}, "pad: unknown value 'min'"),
        ({"pad_multiple": 0}, "pad_multiple: expected at least 1"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        made([5, 5], **options)


@pytest.mark.parametrize("packing", [False, True])
def test_samples_longer_than_a_row(packing: bool) -> None:
    with pytest.raises(DataError, match="a sample has 49 tokens, the rows of a batch 48"):
        made([5, 49], packing=packing)


def test_too_few_samples_for_a_step() -> None:
    with pytest.raises(DataError, match="1 rows are too few for one step of 2 x 2"):
        made([5], 2, world=2, drop_last=True)


def test_a_long_epoch_is_resumed_at_once() -> None:
    dataset = Numbers([5] * 50_000)
    batches = Batches(dataset, 2, MAX)
    list(islice(batches.epoch(0, 20_000), 1))
    assert len(dataset.read) == 2
