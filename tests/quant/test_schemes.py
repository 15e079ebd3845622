"""The NumPy truth of the integer formats: what a scheme is, how well it rounds, how codes lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.quant.schemes import (
    Scheme,
    dequantize,
    dequantize_packed,
    pack,
    packed_shapes,
    quantize,
    quantize_activations,
    quantize_packed,
    unpack,
)

TEXTS = "int8 int4 int4-g64 int4-asym int4-g64-asym int8-g128 int8-g64 int8-asym int8-g64-asym".split()
schemes = st.sampled_from([Scheme.parse(text) for text in TEXTS])


def matrix(n: int, k: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", Scheme(8, 0)),
        ("int4", Scheme(4, 128)),
        ("int4-g64", Scheme(4, 64)),
        ("int4-asym", Scheme(4, 128, True)),
        ("int4-g64-asym", Scheme(4, 64, True)),
        ("int8-g128", Scheme(8, 128)),
        ("int8-asym", Scheme(8, 128, True)),
    ],
)
def test_text_form(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme
    assert str(scheme) == text


def test_text_form_with_the_default_group_spelled_out() -> None:
    assert Scheme.parse("int4-g128") == Scheme.parse("int4")
    assert Scheme.parse("int8-g128-asym") == Scheme.parse("int8-asym")


@pytest.mark.parametrize(
    "text", ["int3", "int4-g32", "int4-g0", "int8-g48", "q4_0", "", "int4 ", "int4-asym-g64"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Scheme.parse(text)


@settings(max_examples=60, deadline=None)
@given(schemes, st.integers(1, 40), st.integers(1, 300), st.integers(0, 1000))
def test_pack_and_unpack_are_inverse(scheme: Scheme, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(k) if seed % 2 else None
    codes = quantize(matrix(n, k, seed), scheme)
    arrays = pack(codes, scheme, order)
    for name, (shape, kind) in packed_shapes(scheme, n, k).items():
        assert arrays[name].shape == shape and arrays[name].dtype == kind
        assert arrays[name].flags.c_contiguous
    back = unpack(arrays, scheme, n, k)
    assert np.array_equal(back.codes, codes.codes)
    assert np.array_equal(back.scales, codes.scales)
    assert scheme.zeros == (back.zeros is not None)
    plain = dequantize(codes)
    model_order = plain if order is None else plain[:, np.argsort(order)]
    assert np.array_equal(dequantize_packed(arrays, scheme, n, k), model_order)


@pytest.mark.parametrize("text", TEXTS)
def test_layout_is_the_documented_one(text: str) -> None:
    scheme, n, k = Scheme.parse(text), 21, 200
    codes = quantize(matrix(n, k), scheme)
    packed = pack(codes, scheme)
    for row, column in [(0, 0), (3, 5), (16, 7), (20, 199), (20, 64), (7, 131)]:
        panel, lane = divmod(row, 16)
        if scheme.bits == 8:
            found = packed["weight"][panel, column // 4, lane, column % 4]
        else:
            byte = packed["weight"][panel, column // 8, lane, column % 4]
            found = byte >> 4 if column % 8 >= 4 else byte & 15
        assert found == codes.codes[row, column]
        group = column // scheme.group if scheme.group else 0
        assert packed["scales"][panel, group, lane] == codes.scales[row, group]
        if codes.zeros is not None:
            assert packed["zeros"][panel, group, lane] == codes.zeros[row, group]


@pytest.mark.parametrize("text", TEXTS)
def test_padding_adds_nothing(text: str) -> None:
    scheme, n, k = Scheme.parse(text), 5, 70
    arrays = pack(quantize(matrix(n, k), scheme), scheme)
    rows, columns = scheme.padded(n, k)
    whole = dequantize_packed(arrays, scheme, rows, columns)
    assert whole.shape == (16, 128)
    assert not whole[n:].any() and not whole[:, k:].any()


@pytest.mark.parametrize(
    ("text", "most"), [("int8", 0.008), ("int8-g128", 0.0075), ("int4", 0.1), ("int4-g64", 0.093)]
)
def test_error_of_normal_weights(text: str, most: float) -> None:
    w = matrix(64, 1024)
    off = dequantize(quantize(w, Scheme.parse(text))) - w
    assert np.sqrt((off**2).mean() / (w**2).mean()) < most


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["int4", "int4-g64", "int4-asym"]), st.integers(0, 1000))
def test_search_is_at_least_as_good_as_the_plain_scale(text: str, seed: int) -> None:
    scheme = Scheme.parse(text)
    w = np.random.default_rng(seed).standard_t(3, (8, 256)).astype(np.float32)
    if scheme.zeros:
        w += 1
    off = ((dequantize(quantize(w, scheme)) - w) ** 2).reshape(-1, scheme.group).sum(1)
    x = w.reshape(-1, scheme.group)
    if scheme.zeros:
        low = np.minimum(x.min(1, keepdims=True), 0)
        step = ((np.maximum(x.max(1, keepdims=True), 0) - low) / 15).astype(np.float16).astype(np.float32)
        zero = np.rint(-low / step)
        plain = step * (np.clip(np.rint(x / step) + zero, 0, 15) - zero)
    else:
        step = (np.abs(x).max(1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
        plain = step * np.clip(np.rint(x / step), -8, 7)
    assert (off <= ((plain - x) ** 2).sum(1) * 1.001).all()
    assert off.sum() < ((plain - x) ** 2).sum()


@pytest.mark.parametrize("text", TEXTS)
def test_zero_groups_stay_zero(text: str) -> None:
    scheme = Scheme.parse(text)
    w = matrix(4, 256)
    w[1] = 0
    w[2, :128] = 0
    back = dequantize(quantize(w, scheme))
    assert not back[1].any() and not back[2, :128].any()
    assert np.isfinite(back).all() and back[0].any()


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "int8"])
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e4])
def test_the_whole_range_of_half_precision_scales(text: str, size: float) -> None:
    w = matrix(4, 256, scale=1.0) * np.float32(size)
    codes = quantize(w, Scheme.parse(text))
    back = dequantize(codes)
    assert np.isfinite(back).all() and codes.scales.dtype == np.float16
    assert np.abs(back - w).max() < size * (0.9 if size > 1e-6 else 4)


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "int8"])
def test_scales_beyond_half_precision_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="use int8"):
        quantize(matrix(2, 128, scale=1e8), Scheme.parse(text))


def test_int8_rows_take_any_size() -> None:
    w = matrix(3, 100, scale=1.0) * np.array([[1e30], [1e-20], [1e-35]], np.float32)
    back = dequantize(quantize(w, Scheme(8, 0)))
    assert np.abs(back[:2] - w[:2]).max(axis=1)[0] < 0.02 * 1e30
    assert np.corrcoef(back[1], w[1])[0, 1] > 0.9999
    assert not back[2].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", TEXTS)
def test_weights_that_are_no_numbers_are_refused(text: str, value: float) -> None:
    w = matrix(4, 128)
    w[2, 3] = value
    with pytest.raises(CheckpointError, match="not a finite number"):
        quantize(w, Scheme.parse(text))


@settings(max_examples=40, deadline=None)
@given(schemes, st.integers(1, 70), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_streaming_in_runs_of_rows(scheme: Scheme, n: int, cuts: list[int], seed: int) -> None:
    w = matrix(n, 130, seed)
    places = [0, *sorted(min(cut, n) for cut in cuts), n]
    parts = [w[a:b] for a, b in zip(places, places[1:], strict=False)]
    whole = pack(quantize(w, scheme), scheme)
    streamed = quantize_packed(parts, scheme, n, 130)
    assert streamed.keys() == whole.keys()
    assert all(np.array_equal(streamed[name], whole[name]) for name in whole)


def test_streaming_wants_all_rows() -> None:
    scheme = Scheme(8, 0)
    with pytest.raises(CheckpointError, match="20 rows of a matrix of 21"):
        quantize_packed([matrix(20, 8)], scheme, 21, 8)
    with pytest.raises(CheckpointError, match="more rows"):
        quantize_packed([matrix(20, 8), matrix(2, 8)], scheme, 21, 8)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_wrong_arrays_are_named(change: str) -> None:
    scheme = Scheme.parse("int4-asym")
    arrays = pack(quantize(matrix(20, 130), scheme), scheme)
    if change == "missing":
        del arrays["zeros"]
    elif change == "extra":
        arrays["bias"] = arrays["zeros"]
    elif change == "shape":
        arrays["zeros"] = arrays["zeros"][:1]
    else:
        arrays["zeros"] = arrays["zeros"].astype(np.int8)
    with pytest.raises(CheckpointError, match="bias" if change == "extra" else "zeros"):
        unpack(arrays, scheme, 20, 130)


def test_an_order_that_is_no_permutation_is_refused() -> None:
    scheme = Scheme.parse("int4")
    with pytest.raises(CheckpointError, match="permutation"):
        pack(quantize(matrix(16, 4), scheme), scheme, np.array([0, 1, 1, 3]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 300), st.sampled_from([64, 128, 384]), st.booleans(), st.integers(0, 99)
)
def test_activations(rows: int, k: int, block: int, wide: bool, seed: int) -> None:
    x = matrix(rows, k, seed, scale=3.0)
    x[0, : min(k, block)] = 0
    q, scale, total = quantize_activations(x, block, wide)
    blocks, pieces = -(-k // block), 2 if wide else 1
    assert q.shape == (rows, pieces, blocks * block) and q.dtype == np.int8 and q.min() >= -127
    assert scale.shape == (rows, blocks) and total.shape == (rows, pieces, blocks)
    runs = q.reshape(rows, pieces, blocks, block)
    assert np.array_equal(runs.sum(3, dtype=np.int64), total)
    levels = runs[:, 0] * np.float64(256) + runs[:, 1] if wide else runs[:, 0]
    back = (levels * scale[:, :, None]).reshape(rows, -1)
    assert not back[:, k:].any()
    # A half of a step; a whole one where the second piece would have to be 128.
    assert (np.abs(back[:, :k] - x) <= np.repeat(scale, block, 1)[:, :k] * (1.01 if wide else 0.5001)).all()
    assert scale[0, 0] == 0 and not q[0, :, : min(k, block)].any()
