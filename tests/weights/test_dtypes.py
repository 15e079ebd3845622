"""Conversion between the three floats: exact where it can be, nearest-even where not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import bfloat16_to_float32, convert_block, float32_to_bfloat16

ALL_BITS = np.arange(65536, dtype=np.uint16)


def test_every_bfloat16_survives_the_way_through_float32() -> None:
    back, _ = convert_block(convert_block(ALL_BITS, "bfloat16", "float32")[0], "float32", "bfloat16")
    nan = (ALL_BITS & 0x7FFF) > 0x7F80
    assert np.array_equal(back[~nan], ALL_BITS[~nan])
    assert np.array_equal((back[nan] & 0x7FFF) > 0x7F80, np.ones(nan.sum(), bool))


def test_every_float16_survives_the_way_through_float32() -> None:
    half = ALL_BITS.view(np.float16)
    back, lost = convert_block(convert_block(half, "float16", "float32")[0], "float32", "float16")
    nan = np.isnan(half)
    assert lost == 0
    assert np.array_equal(back[~nan].view(np.uint16), ALL_BITS[~nan])
    assert np.isnan(back[nan]).all()


@given(st.integers(0, 2**32 - 1))
@example(0x3F808000)  # halfway, even below
@example(0x3F818000)  # halfway, even above
@example(0x3F80FFFF)
@example(0x7F7F8000)  # halfway to infinity
def test_rounding_to_bfloat16_takes_the_nearer_neighbour(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    got = float32_to_bfloat16(value)
    if np.isnan(value[0]):
        assert np.isnan(bfloat16_to_float32(got)[0])
        return
    below, above = np.uint16(bits >> 16), (bits >> 16) + 1
    rest = bits & 0xFFFF
    even = below if below % 2 == 0 else above
    expected = below if rest < 0x8000 else above if rest > 0x8000 else even
    assert int(got[0]) == int(expected)


def test_a_nan_with_low_bits_only_does_not_become_infinite() -> None:
    sneaky = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(sneaky))).all()


def test_values_that_become_infinite_are_counted_and_old_infinities_are_not() -> None:
    values = np.array([65504, 65520, -70000, np.inf, -np.inf, np.nan, 1e-30], np.float32)
    half, lost = convert_block(values, "float32", "float16")
    assert lost == 2
    assert half.dtype == np.float16
    assert np.isnan(half[5])
    bits = float32_to_bfloat16(np.array([1e5, 3.0], np.float32))
    assert convert_block(bits, "bfloat16", "float16")[1] == 1
    assert convert_block(np.array([3.4e38, 1.0], np.float32), "float32", "bfloat16")[1] == 1


def test_same_format_is_not_copied() -> None:
    assert convert_block(ALL_BITS, "bfloat16", "bfloat16")[0] is ALL_BITS


def test_integers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="int32"):
        convert_block(np.zeros(2, np.int32), "int32", "float32")
