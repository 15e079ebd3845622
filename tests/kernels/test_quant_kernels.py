"""Integer matrix kernels against their arithmetic in NumPy, on every instruction set this processor has."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from research.qwen.errors import KernelError
from research.qwen.quant import schemes
from tests.kernels import cpu_truth
from tests.kernels import quant_cases as cases
from tests.kernels.native_library import load, native_on, unaligned

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
ROWS = (1, 2, 3, 7, 8, 16, 17, 33, 130)
SHAPES = ((1, 1), (16, 64), (33, 130), (50, 500), (7, 129), (96, 640))


native = native_on()


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def close(y, wanted, magnitude):
    assert (np.abs(y - wanted) <= 1e-6 * magnitude + 1e-30).all(), np.max(np.abs(y - wanted) / magnitude)


@pytest.mark.parametrize("text", cases.SCHEMES)
def test_product(native, rng, text):
    for n, k in SHAPES:
        m = cases.matrix(rng, text, n, k)
        x = cases.activations(rng, 130, k)
        wanted, magnitude = cases.product(x, m)
        for rows in ROWS:
            close(cases.run(native, x[:rows], m), wanted[:rows], magnitude[:rows])


@pytest.mark.parametrize("text", cases.SCHEMES)
def test_a_row_of_a_batch_equals_the_row_alone(native, rng, text):
    m = cases.matrix(rng, text, 75, 300)
    x = cases.activations(rng, 300, 300)
    batch = cases.run(native, x, m)
    alone = np.concatenate([cases.run(native, x[i : i + 1], m) for i in range(300)])
    np.testing.assert_array_equal(batch, alone)
    for rows in range(1, 40):
        np.testing.assert_array_equal(cases.run(native, x[:rows], m), alone[:rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("text", ["int8", "int8x16", "int4-asym", "int4-asymx16"])
def test_bias_residual_and_order(native, rng, text):
    n, k = 45, 330
    m = cases.matrix(rng, text, n, k, order=True)
    bias = rng.standard_normal(n).astype(np.float32)
    for rows in ROWS:
        x = cases.activations(rng, rows, k)
        residual = rng.standard_normal((rows, n)).astype(np.float32)
        wanted, magnitude = cases.product(x, m)
        plain = cases.run(native, x, m)
        close(plain, wanted, magnitude)
        np.testing.assert_array_equal(cases.run(native, x, m, bias), plain + bias)
        both = cases.run(native, x, m, bias, residual)
        np.testing.assert_array_equal(both, plain + bias + residual)
        y = residual.copy()
        assert native.bind("QwenTestQuantLinear", [x, *m.parts(), m.order, m.about, bias, y], y)() == 0
        np.testing.assert_array_equal(y, both)


@pytest.mark.parametrize("text", cases.SCHEMES)
def test_gated(native, rng, text):
    n, k = 45, 330
    a, b = cases.matrix(rng, text, n, k), cases.matrix(rng, text, n, k)
    for rows in ROWS:
        x = cases.activations(rng, rows, k) / 100
        one, two = cases.run(native, x, a), cases.run(native, x, b)
        y = cases.gated(native, x, a, b)
        np.testing.assert_allclose(y, cpu_truth.swiglu(one, two), rtol=2e-6, atol=1e-30)
        separate = np.empty_like(y)
        assert native.bind("QwenSwiGlu", [one, two], separate)() == 0
        np.testing.assert_array_equal(y, separate)


@pytest.mark.parametrize("text", cases.STORED)
@pytest.mark.parametrize("order", [False, True])
def test_float_activations(native, rng, text, order):
    for n, k in SHAPES:
        m = cases.matrix(rng, text, n, k, order)
        w = schemes.dequantize_packed(m.arrays, m.scheme, n, k)
        x = cases.activations(rng, 17, k)
        bias = rng.standard_normal(n).astype(np.float32)
        residual = rng.standard_normal((17, n)).astype(np.float32)
        y = cases.run(native, x, m, bias, residual, "QwenTestFloatLinear")
        wanted = x.astype(np.float64) @ w.astype(np.float64).T + bias + residual
        magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(bias) + np.abs(residual)
        assert (np.abs(y - wanted) <= 2e-6 * magnitude).all()
        for rows in (1, 2, 5, 8):
            part = cases.run(native, x[:rows], m, bias, residual[:rows], "QwenTestFloatLinear")
            np.testing.assert_array_equal(part, y[:rows])


@pytest.mark.parametrize("text", ["int4-g64", "int4", "int8"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("k", [1, 64, 130, 513])
def test_quantised_activations(native, rng, text, wide, k):
    scheme = schemes.Scheme.parse(text)
    about = np.array([16, k, scheme.bits, scheme.group, wide], np.int64)
    x = cases.activations(rng, 21, k)
    norm = rng.standard_normal(k).astype(np.float32)
    eps = np.array([1e-6], np.float32)
    for own_norm in (False, True):
        for order in (cases.NOTHING, rng.permutation(k).astype(np.int32)):
            rows = x
            if own_norm:
                rows = np.empty_like(x)
                assert native.bind("QwenRmsNorm", [x, norm, eps], rows)() == 0
            ordered = rows[:, order] if len(order) else rows
            wanted = schemes.quantize_activations(ordered, scheme.run(k, wide), wide)
            out = [np.full_like(part, 99) for part in wanted]
            inputs = [x, norm if own_norm else cases.NOTHING, eps, order, about, *out]
            assert native.bind("QwenTestQuantize", inputs, np.empty(0, np.float32))() == 0
            for got, part in zip(out, wanted, strict=True):
                np.testing.assert_array_equal(got, part)


@pytest.mark.parametrize("text", cases.STORED)
@pytest.mark.parametrize("order", [False, True])
def test_dequantised_rows(native, rng, text, order):
    n, k = 37, 200
    m = cases.matrix(rng, text, n, k, order)
    rows = np.array([0, 15, 16, 36, 5], np.int64)
    y = np.full((len(rows), k), np.nan, np.float32)
    assert native.bind("QwenTestDequantizeRows", [*m.parts(), m.order, m.about, rows], y)() == 0
    np.testing.assert_array_equal(y, schemes.dequantize_packed(m.arrays, m.scheme, n, k)[rows])


def everything(native, m, other, x, residual):
    """Results of every kernel with these weights."""
    return [
        cases.run(native, x, m, residual[0], residual),
        cases.run(native, x, m, residual[0], residual, "QwenTestFloatLinear"),
        cases.gated(native, x, m, other),
    ]


@pytest.mark.parametrize("text", cases.SCHEMES)
def test_arrays_at_the_end_of_memory_and_unaligned(native, rng, text):
    n, k = 45, 330
    a, b = (cases.matrix(rng, text, n, k, order=text == "int4") for _ in range(2))
    b.arrays.update({"order": a.order} if len(a.order) else {})
    for rows in (1, 4, 6, 16, 35):
        x = cases.activations(rng, rows, k) / 100
        residual = rng.standard_normal((rows, n)).astype(np.float32)
        wanted = everything(native, a, b, x, residual)
        edge = cases.EndOfPage()
        places = [edge, *(lambda array, offset=offset: unaligned(array, offset) for offset in (4, 8, 17))]
        for move in places:
            results = everything(native, a.moved(move), b.moved(move), move(x), move(residual))
            for got, right in zip(results, wanted, strict=True):
                np.testing.assert_array_equal(got, right)
        y = edge(np.zeros((rows, n), np.float32))
        assert (
            native.bind("QwenTestQuantLinear", [x, *a.parts(), a.order, a.about, residual[0], residual], y)()
            == 0
        )
        np.testing.assert_array_equal(y, wanted[0])


@pytest.mark.parametrize("text", ["int8", "int4", "int8-g64", "int8x16", "int4x16"])
def test_threads_do_not_change_a_bit(native, rng, text):
    a, b = cases.matrix(rng, text, 1000, 200), cases.matrix(rng, text, 1000, 200)
    for rows in (1, 9, 40):
        x = cases.activations(rng, rows, 200) / 100
        residual = rng.standard_normal((rows, 1000)).astype(np.float32)
        native.set_threads(1)
        one = everything(native, a, b, x, residual)
        for count in (2, 5):
            native.set_threads(count)
            for got, right in zip(everything(native, a, b, x, residual), one, strict=True):
                np.testing.assert_array_equal(got, right)
        native.set_threads(2)


@pytest.mark.parametrize("text", cases.SCHEMES)
def test_instruction_sets_with_fused_products_agree_bit_for_bit(rng, text, tmp_path):
    libraries = []
    for isa in ("amx", "vnni", "avx512", "avx2", "dot"):
        with suppress(KernelError):
            libraries.append(load(isa, tmp_path))
    a, b = cases.matrix(rng, text, 83, 700), cases.matrix(rng, text, 83, 700)
    for rows in (1, 4, 8, 16, 50):
        x = cases.activations(rng, rows, 700) / 100
        residual = rng.standard_normal((rows, 83)).astype(np.float32)
        results = [everything(library, a, b, x, residual) for library in libraries]
        for other in results[1:]:
            for got, right in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(got, right)


def test_what_does_not_fit_is_refused(native, rng):
    m = cases.matrix(rng, "int4", 32, 128)
    x = cases.activations(rng, 2, 128)
    y = np.zeros((2, 32), np.float32)
    for about in ([32, 128, 5, 128, 0], [32, 128, 4, 96, 0], [0, 128, 4, 128, 0], [32, 64, 4, 128, 1]):
        inputs = [x, *m.parts(), m.order, np.array(about, np.int64), cases.NOTHING, cases.NOTHING]
        assert native.bind("QwenTestQuantLinear", inputs, y)() == 1
        assert native.bind("QwenTestFloatLinear", inputs, y)() == 1
    assert not y.any()


def test_what_is_not_finite_shows(native, rng):
    m = cases.matrix(rng, "int4", 20, 256)
    x = cases.activations(rng, 3, 256)
    x[1, 130] = np.nan
    y = cases.run(native, x, m)
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
