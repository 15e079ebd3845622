"""Rounding float weights to integer levels: a whole row by its largest value, a group by a small search for its scale.

The scale of a group is rounded to float16 before any code is chosen, so what is minimised is the error of what will be
stored. All sums run in one order over 16 lanes (``_lane_sum``), so that the C++ twin gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError

LANES = 16
# The extreme value of a group is tried at these (negative) levels; beyond -8 it is clipped.
EXTREMES = tuple(np.float32(7.0 + 0.5 * i) for i in range(8))
# With zero points, the range of a group is tried at these fractions of its width.
SHRINKS = tuple(np.float32(1.0 - 0.05 * i) for i in range(8))
HALF_MAX = np.float32(65504)
TINY = np.float32(1e-30)  # a row of int8 whose scale would be below this is zero

# scales (R,), zero points (R,), levels (R, group): codes less their zero point; the last two hold whole numbers
Rounded = tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]


def round_rows(w: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales (N, 1) and levels -127..127 (N, K) of w (N, K): the largest value of a row becomes 127 or -127."""
    scales = np.abs(w).max(axis=1, keepdims=True, initial=0) / np.float32(127)
    scales[scales < TINY] = 0
    return scales, np.rint(w * _inverse(scales))


def round_groups(x: NDArray[np.float32], bits: int, own_zeros: bool) -> Rounded:
    """Scales, zero points and levels of groups x (R, group); CheckpointError if float16 cannot hold a scale."""
    return _with_zeros(x, bits) if own_zeros else _symmetric(x, bits)


def _symmetric(x: NDArray[np.float32], bits: int) -> Rounded:
    """Groups x (R, group) -> scales (R,), zero points (R,), levels (R, group): codes less the zero points."""
    middle = np.full(len(x), 1 << (bits - 1), np.float32)
    if bits == 8:
        scales = _half(np.abs(x).max(axis=1) / np.float32(127))
        return scales, middle, _levels(x, scales, middle, (1 << bits) - 1)
    # The value farthest from zero goes to the end that reaches farther, -8: the scale may be negative.
    high, low = x.max(axis=1), x.min(axis=1)
    extreme = np.where(-low > high, low, high)
    return _search(x, bits, [_half(extreme / -level) for level in EXTREMES], lambda scales: middle)


def _with_zeros(x: NDArray[np.float32], bits: int) -> Rounded:
    low, high = x.min(axis=1, initial=0), x.max(axis=1, initial=0)
    top = np.float32((1 << bits) - 1)
    width = high / top - low / top

    def zero_points(scales: NDArray[np.float16]) -> NDArray[np.float32]:
        zeros: NDArray[np.float32] = np.minimum(np.rint(-low * _inverse(scales)), top)
        return zeros

    if bits == 8:
        scales = _half(width)
        zeros = zero_points(scales)
        return scales, zeros, _levels(x, scales, zeros, (1 << bits) - 1)
    return _search(x, bits, [_half(width * shrink) for shrink in SHRINKS], zero_points)


def _search(
    x: NDArray[np.float32],
    bits: int,
    candidates: Iterable[NDArray[np.float16]],
    zero_points: Callable[[NDArray[np.float16]], NDArray[np.float32]],
) -> Rounded:
    """The candidate with the smallest squared error (the first of equals), then one step of least squares."""
    best_scales = np.zeros(len(x), np.float16)
    best_zeros = np.full(len(x), 1 << (bits - 1), np.float32)
    best_error = np.full(len(x), np.inf, np.float32)
    best_levels = np.zeros_like(x)

    def consider(scales: NDArray[np.float16], zeros: NDArray[np.float32]) -> None:
        levels = _levels(x, scales, zeros, (1 << bits) - 1)
        off: NDArray[np.float32] = x - scales.astype(np.float32)[:, None] * levels
        error = _lane_sum(off * off)
        better = error < best_error
        best_scales[better], best_zeros[better] = scales[better], zeros[better]
        best_error[better], best_levels[better] = error[better], levels[better]

    for scales in candidates:
        consider(scales, zero_points(scales))
    power, product = _lane_sum(best_levels * best_levels), _lane_sum(x * best_levels)
    consider(_half(np.divide(product, power, out=np.zeros_like(power), where=power > 0)), best_zeros.copy())
    return best_scales, best_zeros, best_levels


def _levels(
    x: NDArray[np.float32], scales: NDArray[np.float16], zeros: NDArray[np.float32], top: int
) -> NDArray[np.float32]:
    """Nearest levels (ties to even) that a code of [0, top] less its zero point can have."""
    nearest = np.rint(x * _inverse(scales)[:, None])
    bounded: NDArray[np.float32] = np.minimum(np.maximum(nearest, -zeros[:, None]), top - zeros[:, None])
    return bounded


def _half(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales as stored; CheckpointError beyond float16."""
    if (np.abs(scales) > HALF_MAX).any():
        raise CheckpointError(
            "weights are too large for scales in float16; use int8, which has float32 scales"
        )
    return scales.astype(np.float16)


def _inverse(scales: NDArray[Any]) -> NDArray[np.float32]:
    """1 / scale, and 0 for 0."""
    wide = scales.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def _lane_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of rows (R, group): 16 lanes, each in order, then halves of the lanes."""
    lanes = values.reshape(len(values), -1, LANES)
    total = lanes[:, 0].copy()
    for i in range(1, lanes.shape[1]):
        total += lanes[:, i]
    for half in (8, 4, 2, 1):
        total = total[:, :half] + total[:, half : 2 * half]
    result: NDArray[np.float32] = total[:, 0]
    return result
