"""Several short samples in one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

from research.qwen.errors import DataError

WINDOW: Final = 4096  # samples that are looked at together


def pack(
    lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None, window: int = WINDOW
) -> list[list[int]]:
    """Return rows of sample numbers; every sample is in one row, and a row holds at most ``capacity`` tokens.

    Best fit by decreasing length within each ``window`` of the order: a sample goes into the fullest row that has room
    for it. Rows come in the order of their first sample, and so do the samples within a row; nothing depends on chance.

    Args:
        lengths: tokens of each sample, by number.
        capacity: tokens a row may have.
        order: numbers of the samples in the order they are to be packed (default: all, as they are).
        window: samples that may share rows.

    Raises:
        DataError: a sample is longer than a row.
    """
    order = range(len(lengths)) if order is None else order
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        sizes = [int(lengths[n]) for n in part]
        rows += [[part[rank] for rank in row] for row in _pack_window(sizes, capacity)]
    return rows


def _pack_window(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), by room
    for rank in sorted(range(len(sizes)), key=lambda rank: (-sizes[rank], rank)):
        size = sizes[rank]
        if size > capacity:
            raise DataError(
                f"a sample of {size} tokens does not fit into a row of {capacity}; raise max_length"
            )
        place = bisect_left(free, (size, -1))
        if place == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(place)
        rows[row].append(rank)
        if room > size:
            insort(free, (room - size, row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
