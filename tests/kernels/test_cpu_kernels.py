"""The C++ kernels against float64, on every instruction set this processor has; called without MindSpore."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from research.qwen.kernels.arrays import widen
from tests.kernels import cpu_truth as truth
from tests.kernels.native_library import native_on, unaligned

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
BAD_ARGUMENT = 1
BAD_INDEX = 2


native = native_on()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def linear(native, x, w, fmt, bias=None):
    name = f"QwenLinear{'' if bias is None else 'Bias'}{truth.SUFFIX[fmt]}"
    y = np.full((len(x), len(w)), np.nan, np.float32)
    assert native.bind(name, [x, w, *([] if bias is None else [bias])], y)() == 0
    return y


@pytest.mark.parametrize("fmt", truth.FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 21])
def test_linear(native, rng, fmt, tokens):
    for k, n in [(1, 1), (7, 3), (16, 6), (33, 13), (100, 64), (1024, 7), (1030, 12), (2500, 25)]:
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        w = truth.stored(rng.standard_normal((n, k)), fmt)
        bias = rng.standard_normal(n).astype(np.float32)
        scale = np.abs(x) @ np.abs(widen(w, fmt)).T + 1
        for b in (None, bias):
            error = np.abs(linear(native, x, w, fmt, b) - truth.linear(x, w, fmt, b))
            assert (error <= 5e-7 * scale).all(), (k, n, float((error / scale).max()))


@pytest.mark.parametrize("fmt", truth.FORMATS)
def test_a_row_of_a_batch_equals_the_row_alone(native, rng, fmt):
    x = rng.standard_normal((70, 1100)).astype(np.float32)
    w = truth.stored(rng.standard_normal((37, 1100)), fmt)
    alone = np.concatenate([linear(native, x[i : i + 1], w, fmt) for i in range(70)])
    for tokens in range(1, 71):
        np.testing.assert_array_equal(
            linear(native, x[:tokens], w, fmt), alone[:tokens], err_msg=f"{tokens} rows"
        )


def test_rows_beyond_one_block_equal_the_rows_alone(native, rng):
    x = rng.standard_normal((530, 40)).astype(np.float32)
    w = rng.standard_normal((50, 40)).astype(np.float32)
    y = linear(native, x, w, "float32")
    for i in (0, 127, 128, 511, 512, 529):
        np.testing.assert_array_equal(y[i : i + 1], linear(native, x[i : i + 1], w, "float32"))


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 6, 20])
def test_half_storage_equals_float32_storage(native, rng, fmt, tokens):
    x = rng.standard_normal((tokens, 1111)).astype(np.float32)
    w = truth.stored(rng.standard_normal((19, 1111)), fmt)
    np.testing.assert_array_equal(linear(native, x, w, fmt), linear(native, x, widen(w, fmt), "float32"))


@pytest.mark.parametrize("fmt", truth.FORMATS)
@pytest.mark.parametrize("offset", [1, 2, 8, 62])
def test_unaligned_weights(native, rng, fmt, offset):
    for tokens in (1, 5, 12):
        x = rng.standard_normal((tokens, 77)).astype(np.float32)
        w = truth.stored(rng.standard_normal((9, 77)), fmt)
        np.testing.assert_array_equal(linear(native, x, unaligned(w, offset), fmt), linear(native, x, w, fmt))


def test_threads_do_not_change_a_bit(native, rng):
    x = rng.standard_normal((64, 300)).astype(np.float32)
    w = rng.standard_normal((500, 300)).astype(np.float32)
    results = []
    for threads in (1, 2, 5, 3):
        native.set_threads(threads)
        assert native.threads == threads
        results.append((linear(native, x[:1], w, "float32"), linear(native, x, w, "float32")))
    native.set_threads(2)
    for other in results[1:]:
        for mine, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(mine, want)


def test_calls_from_two_threads_at_once(native, rng):
    x = rng.standard_normal((33, 400)).astype(np.float32)
    w = rng.standard_normal((600, 400)).astype(np.float32)
    want = linear(native, x, w, "float32")
    wrong: list[int] = []

    def work():
        for i in range(30):
            if not np.array_equal(linear(native, x[: 1 + i], w, "float32"), want[: 1 + i]):
                wrong.append(i)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("k", [1, 5, 16, 64, 1000, 2048])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rms_norm(native, rng, k, tokens):
    x = (rng.standard_normal((tokens, k)) * 30).astype(np.float32)
    w = rng.standard_normal(k).astype(np.float32)
    y = np.empty_like(x)
    assert native.bind("QwenRmsNorm", [x, w, np.array([1e-6], np.float32)], y)() == 0
    np.testing.assert_allclose(y, truth.rms_norm(x, w, 1e-6), rtol=1e-6)


def test_rms_norm_of_zeros_and_of_large_values(native):
    x = np.stack([np.zeros(33), np.full(33, 1e15), np.full(33, 1e-6)]).astype(np.float32)
    y = np.empty_like(x)
    assert native.bind("QwenRmsNorm", [x, np.ones(33, np.float32), np.array([1e-6], np.float32)], y)() == 0
    np.testing.assert_allclose(y, truth.rms_norm(x, np.ones(33), 1e-6), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 100), (40, 1000)])
def test_swiglu(native, rng, shape):
    a = rng.standard_normal(shape).astype(np.float32)
    b = (rng.standard_normal(shape) * 20).astype(np.float32)
    b.flat[:1] = -3e4
    b.flat[-1:] = 3e4
    y = np.empty_like(a)
    assert native.bind("QwenSwiGlu", [a, b], y)() == 0
    np.testing.assert_allclose(y, truth.swiglu(a, b), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("fmt", truth.FORMATS)
@pytest.mark.parametrize("dim", [1, 16, 37])
def test_embedding_is_exact(native, rng, fmt, dim):
    weight = truth.stored(rng.standard_normal((50, dim)) * 1e-3, fmt)
    ids = np.array([0, 49, 7, 7], np.int32)
    y = np.empty((4, dim), np.float32)
    assert native.bind(f"QwenEmbedding{truth.SUFFIX[fmt]}", [ids, unaligned(weight, 2)], y)() == 0
    np.testing.assert_array_equal(y, widen(weight, fmt)[ids])


def test_every_half_is_widened_exactly(native):
    """All 65536 float16 values, subnormals, infinities and NaNs included."""
    weight = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    y = np.empty((64, 1024), np.float32)
    assert native.bind("QwenEmbeddingF16", [np.arange(64, dtype=np.int32), weight], y)() == 0
    np.testing.assert_array_equal(y, weight.astype(np.float32))


def test_wrong_arguments_are_refused(native):
    x, w = np.ones((2, 8), np.float32), np.ones((3, 9), np.float32)
    assert native.bind("QwenLinearF32", [x, w], np.zeros((2, 3), np.float32))() == BAD_ARGUMENT
    ids = np.array([0, 3], np.int32)
    assert native.bind("QwenEmbeddingF32", [ids, w], np.zeros((2, 9), np.float32))() == BAD_INDEX
