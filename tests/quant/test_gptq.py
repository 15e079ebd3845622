"""AutoGPTQ's layout against its definition written out, and back to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.quant.gptq import SUFFIXES, GptqFormat, from_gptq, to_gptq
from research.qwen.quant.schemes import Scheme, dequantize_packed, pack, quantize

Module = dict[str, np.ndarray]


def make_module(bits: int, group: int, n: int, k: int, sym: bool, act_order: bool, seed: int = 0) -> Module:
    """A random module, stored with plain loops over the definition."""
    rng = np.random.default_rng(seed)
    groups, per_word = -(-k // group), 32 // bits
    q = rng.integers(0, 1 << bits, (k, n))
    stored = np.full((groups, n), (1 << (bits - 1)) - 1)
    if not sym:
        stored = rng.integers(0, (1 << bits) - (bits == 8), (groups, n))
    qweight, qzeros = np.zeros((k // per_word, n), np.uint32), np.zeros((groups, n // per_word), np.uint32)
    for i in range(k):
        qweight[i // per_word] |= (q[i] << (i % per_word * bits)).astype(np.uint32)
    for j in range(n):
        qzeros[:, j // per_word] |= (stored[:, j] << (j % per_word * bits)).astype(np.uint32)
    g_idx = np.arange(k) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    return {
        "qweight": qweight.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": rng.uniform(0.001, 0.1, (groups, n)).astype(np.float16),
        "g_idx": g_idx.astype(np.int32),
    }


def definition(module: Module, bits: int) -> np.ndarray:
    """W (N, K) by the formula of the layout, number by number."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    k, n = len(module["g_idx"]), module["scales"].shape[1]
    w = np.empty((n, k), np.float32)
    for i in range(k):
        q = module["qweight"].view(np.uint32)[i // per_word] >> (i % per_word * bits) & mask
        g = module["g_idx"][i]
        for j in range(n):
            zero = (
                int(module["qzeros"].view(np.uint32)[g, j // per_word]) >> (j % per_word * bits) & mask
            ) + 1
            w[j, i] = np.float32(module["scales"][g, j]) * np.float32(int(q[j]) - zero)
    return w


CASES = [
    (4, 128, 24, 136, True, False),
    (4, 64, 24, 128, False, False),
    (4, 64, 16, 72, False, True),
    (4, 128, 40, 256, True, True),
    (8, 128, 20, 132, True, False),
    (8, 64, 36, 128, False, True),
]


@pytest.mark.parametrize(("bits", "group", "n", "k", "sym", "act_order"), CASES)
def test_against_the_definition(bits: int, group: int, n: int, k: int, sym: bool, act_order: bool) -> None:
    module = make_module(bits, group, n, k, sym, act_order)
    scheme, arrays = from_gptq(module, GptqFormat(bits, group), n, k, zeros=False)
    assert (scheme.bits, scheme.group, scheme.zeros) == (bits, group, not sym)
    assert ("order" in arrays) == act_order
    assert np.array_equal(dequantize_packed(arrays, scheme, n, k), definition(module, bits))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([64, 128]),
    st.integers(1, 6),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_there_and_back(
    bits: int, group: int, n8: int, k8: int, sym: bool, act_order: bool, zeros: bool, seed: int
) -> None:
    n, k = 8 * n8, 8 * k8
    module = make_module(bits, group, n, k, sym, act_order, seed)
    scheme, arrays = from_gptq(module, GptqFormat(bits, group), n, k, zeros)
    assert scheme.zeros == (zeros or not sym)
    back = to_gptq(arrays, scheme, n, k)
    assert set(back) == set(SUFFIXES)
    for name in SUFFIXES:
        assert back[name].dtype == module[name].dtype and np.array_equal(back[name], module[name])


def test_padding_is_zero() -> None:
    module = make_module(4, 64, 8, 72, False, False)
    scheme, arrays = from_gptq(module, GptqFormat(4, 64), 8, 72, zeros=False)
    points = arrays["zeros"][0, -1, :8]
    whole = dequantize_packed(arrays, scheme, 16, 128)
    assert not whole[8:].any()
    assert not whole[:8][points <= 15, 72:].any()


@pytest.mark.parametrize(
    "raw",
    [
        {"bits": 3, "group_size": 128},
        {"bits": 4, "group_size": -1},
        {"bits": 4, "group_size": 32},
        {"bits": 4},
        {"bits": 4, "group_size": 128, "quant_method": "awq"},
        {"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"},
        {"bits": 4, "group_size": 128, "is_marlin_format": True},
    ],
)
def test_other_quantisers_are_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        GptqFormat.from_dict(raw)


def test_a_zero_point_of_zero_cannot_be_written() -> None:
    scheme = Scheme.parse("int4-g64-asym")
    codes = quantize(np.random.default_rng(0).random((16, 128), np.float32), scheme)  # nothing is negative
    assert codes.zeros is not None and not codes.zeros.all()
    with pytest.raises(CheckpointError, match="zero point of 0"):
        to_gptq(pack(codes, scheme), scheme, 16, 128)


def test_whole_rows_cannot_be_written() -> None:
    scheme = Scheme.parse("int8")
    with pytest.raises(CheckpointError, match="no groups"):
        to_gptq(pack(quantize(np.ones((16, 128), np.float32), scheme), scheme), scheme, 16, 128)


def test_damaged_modules_are_refused() -> None:
    fmt = GptqFormat(4, 64)
    module = make_module(4, 64, 16, 128, True, True)
    with pytest.raises(CheckpointError, match="qzeros"):
        from_gptq({**module, "qzeros": module["qzeros"][:1]}, fmt, 16, 128, False)
    with pytest.raises(CheckpointError, match="g_idx"):
        from_gptq({**module, "g_idx": np.zeros(128, np.int32)}, fmt, 16, 128, False)
    with pytest.raises(CheckpointError, match="whole words"):
        from_gptq(module, fmt, 16, 129, False)
    module = make_module(8, 64, 16, 128, True, False)
    with pytest.raises(CheckpointError, match="256"):
        from_gptq({**module, "qzeros": np.full_like(module["qzeros"], -1)}, GptqFormat(8, 64), 16, 128, False)
