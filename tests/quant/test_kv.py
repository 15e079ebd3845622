"""The published quantiser of the int8 KV cache, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.quant.kv import dequantize_cache, quantize_cache
from tests.gptq_fixtures import kv_int8_quantizer

CASES = kv_int8_quantizer()


def test_there_are_cases() -> None:
    assert len(CASES) == 8


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden(name: str) -> None:
    golden = CASES[name]
    codes, scale, zero = quantize_cache(golden["x"])
    assert np.array_equal(codes, golden["q"])
    assert scale.shape == zero.shape == (*golden["x"].shape[:2], 1, 1)
    assert np.array_equal(np.broadcast_to(scale, golden["scale"].shape), golden["scale"])
    assert np.array_equal(np.broadcast_to(zero, golden["zero"].shape), golden["zero"])
    assert np.array_equal(dequantize_cache(codes, scale, zero), golden["dequant"])


def test_a_constant_head_gives_finite_numbers() -> None:
    codes, scale, zero = quantize_cache(np.full((1, 2, 3, 8), 0.5, np.float32))
    assert not scale.any() and np.isfinite(dequantize_cache(codes, scale, zero)).all()
