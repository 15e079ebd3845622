"""Packing loses nothing, splits nothing, wastes little, and depends on nothing but its arguments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import DataError
from research.qwen.train.packing import pack

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


@given(lengths=LENGTHS, window=st.integers(1, 70), turn=st.integers(0, 59))
@settings(max_examples=50, deadline=None)
def test_every_sample_is_in_one_row_that_holds_it(lengths: list[int], window: int, turn: int) -> None:
    order = [*range(len(lengths))[turn:], *range(len(lengths))[:turn]]
    rows = pack(lengths, CAPACITY, order, window)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= CAPACITY for row in rows)
    assert rows == pack(lengths, CAPACITY, order, window)
    place = {number: rank for rank, number in enumerate(order)}
    for row in rows:
        ranks = [place[number] for number in row]
        assert ranks == sorted(ranks) and len({rank // window for rank in ranks}) == 1
    assert [place[row[0]] for row in rows] == sorted(place[row[0]] for row in rows)


@given(lengths=LENGTHS)
@settings(max_examples=50, deadline=None)
def test_no_two_rows_of_a_window_could_have_been_one(lengths: list[int]) -> None:
    filled = sorted(sum(lengths[number] for number in row) for row in pack(lengths, CAPACITY))
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


def test_best_fit_by_decreasing_length() -> None:
    # First fit in the given order would need three rows.
    assert pack([3, 5, 5, 7], 10) == [[0, 3], [1, 2]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(
        DataError, match="a sample of 11 tokens does not fit into a row of 10; raise max_length"
    ):
        pack([3, 11], 10)
