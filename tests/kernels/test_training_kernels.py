"""The kernels of training against float64, on every instruction set this processor has; called without MindSpore."""

from __future__ import annotations

import math

import numpy as np
import pytest

from research.qwen.kernels.native_training import adamw_numbers
from research.qwen.model.optimizer import Hyper, numpy_update
from tests.kernels.native_library import native_on

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
BAD_ARGUMENT, BAD_INDEX = 1, 2

native = native_on(("avx512", "avx2", "base"))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def run(native, name, inputs, *outputs):
    """Outputs of these shapes; input arrays may be changed in place."""
    arrays = [np.full(shape, np.nan, np.float32) for shape in outputs]
    assert native.bind(name, [*inputs, *arrays[:-1]], arrays[-1])() == 0
    return arrays


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def on_threads(native, function):
    """What a function returns with 1, 2, 3 and 7 threads, all bits equal; the result."""
    results = []
    for threads in (1, 2, 3, 7):
        native.set_threads(threads)
        results.append(function())
    native.set_threads(2)
    for other in results[1:]:
        for mine, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(mine, want)
    return results[0]


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (3, 7), (64, 16), (65, 100), (200, 1024), (130, 33)])
def test_norm_gradient(native, rng, rows, k):
    dy, x, residual, w, eps = *(normal(rng, rows, k) for _ in range(3)), normal(rng, k), np.float32(1e-3)
    inputs = [dy, x, w, np.array([eps])]
    alone, dw = on_threads(native, lambda: run(native, "QwenRmsNormGrad", inputs, (rows, k), (k,)))
    dx, same = run(native, "QwenRmsNormGradPlus", [*inputs, residual], (rows, k), (k,))
    np.testing.assert_array_equal(dx, residual + alone)
    np.testing.assert_array_equal(dw, same)
    wide, flow = x.astype(np.float64), dy.astype(np.float64) * w
    inverse = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + float(eps))
    want = residual + inverse * (flow - wide * inverse**2 * (flow * wide).mean(-1, keepdims=True))
    np.testing.assert_allclose(dx, want, atol=1e-5 * np.abs(want).max(), rtol=1e-5)
    want = (dy * wide * inverse).sum(0)
    np.testing.assert_allclose(dw, want, atol=2e-6 * np.abs(dy * wide * inverse).sum(0).max(), rtol=0)


@pytest.mark.parametrize("size", [1, 15, 17, 5000, 40000])
def test_swiglu_gradient(native, rng, size):
    a, b, dy = normal(rng, 1, size) * 3, normal(rng, 1, size) * 6, normal(rng, 1, size)
    b[0, :1] = -300.0
    da, db = on_threads(native, lambda: run(native, "QwenSwiGluGrad", [a, b, dy], a.shape, a.shape))
    wide = b.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    np.testing.assert_allclose(da, dy * wide * sigmoid, rtol=2e-6, atol=1e-7)
    want = dy * a * (sigmoid + wide * sigmoid * (1 - sigmoid))
    np.testing.assert_allclose(db, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 5), (4, 16), (9, 1000), (5, 151936)])
def test_cross_entropy(native, rng, rows, n):
    logits = normal(rng, rows, n) * 8
    targets = rng.integers(0, n, rows).astype(np.int32)
    targets[rows // 2] = -100 if rows > 1 else 0
    scale = np.array([0.37], np.float32)

    def once():
        changed = logits.copy()
        return run(native, "QwenCrossEntropy", [changed, targets, scale], (rows,))[0], changed

    losses, gradient = on_threads(native, once)
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shares = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    want = np.log(np.exp(wide).sum(-1)) - wide[np.arange(rows), np.maximum(targets, 0)]
    shares[np.arange(rows), np.maximum(targets, 0)] -= 1
    shares[targets < 0], want[targets < 0] = 0, 0
    np.testing.assert_allclose(losses, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.37 * shares, rtol=3e-6, atol=1e-7)


def test_cross_entropy_refuses_a_target_outside(native, rng):
    targets, scale, losses = np.array([4], np.int32), np.ones(1, np.float32), np.zeros(1, np.float32)
    assert native.bind("QwenCrossEntropy", [normal(rng, 1, 4), targets, scale], losses)() == BAD_INDEX


HYPER = Hyper(3e-3, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, 0.7)


@pytest.mark.parametrize("hyper", [HYPER, Hyper(1e-2, 0.9, 0.999, 1e-6, 0.0, 0.1, 0.001, 1.0)])
@pytest.mark.parametrize("size", [1, 13, 16, 200_003])
def test_adamw_gives_the_bits_of_numpy(native, rng, size, hyper):
    start = [normal(rng, size) for _ in range(3)] + [normal(rng, size) ** 2]
    want = [value.copy() for value in start]
    numpy_update(*want, hyper)

    def once():
        mine = [value.copy() for value in start]
        assert native.bind("QwenAdamW", mine, adamw_numbers(hyper))() == 0
        np.testing.assert_array_equal(mine[1], start[1])  # the gradient is only read
        return mine[0], mine[2], mine[3]

    for mine, expected in zip(on_threads(native, once), (want[0], want[2], want[3]), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_adamw_refuses_arrays_of_other_sizes(native, rng):
    arrays = [normal(rng, 5), normal(rng, 5), normal(rng, 4), normal(rng, 5)]
    assert native.bind("QwenAdamW", arrays, adamw_numbers(HYPER))() == BAD_ARGUMENT


@pytest.mark.parametrize("size", [1, 100, 65536, 65537, 700_001])
def test_square_sum(native, rng, size):
    x, out = normal(rng, size), np.zeros(1, np.float64)

    def once():
        assert native.bind("QwenSquareSum", [x], out)() == 0
        return (out.copy(),)

    want = math.fsum(x.astype(np.float64) ** 2)
    assert abs(on_threads(native, once)[0][0] - want) <= 1e-6 * want


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_square_sum_tells_of_what_is_not_finite(native, rng, bad):
    x, out = normal(rng, 70_000), np.zeros(1, np.float64)
    x[69_999] = bad
    assert native.bind("QwenSquareSum", [x], out)() == 0
    assert not np.isfinite(out[0])


def test_sums_of_rows_biases_masks_and_arrays(native, rng):
    x, bias = normal(rng, 300, 700), normal(rng, 700)
    (total,) = on_threads(native, lambda: run(native, "QwenSumRows", [x], (700,)))
    np.testing.assert_allclose(total, x.sum(0, dtype=np.float64), atol=1e-4)
    np.testing.assert_array_equal(run(native, "QwenAddBias", [x, bias], x.shape)[0], x + bias)
    keep, grow = rng.random(x.shape) < 0.9, np.array([1 / 0.9], np.float32)
    np.testing.assert_array_equal(run(native, "QwenDropout", [x, keep, grow], x.shape)[0], x * (keep * grow))
    to = x.copy()
    assert native.bind("QwenAddInto", [to], 2 * x)() == 0
    np.testing.assert_array_equal(to, x + 2 * x)


def attention_truth(qkv, cos, sin, bounds, heads, dy):
    """y, its gradient with respect to qkv, in float64, one text and head at a time."""
    tokens, d = len(qkv), qkv.shape[1] // (3 * heads)
    parts = qkv.astype(np.float64).reshape(tokens, 3, heads, d)
    cos, sin = (np.concatenate((a, a), -1).astype(np.float64)[:, None] for a in (cos, sin))

    def turn(x, sign):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return x * cos + sign * np.concatenate((-b, a), -1) * sin

    q, k, v = turn(parts[:, 0], 1), turn(parts[:, 1], 1), parts[:, 2]
    y, back = np.zeros((tokens, heads, d)), np.zeros_like(parts)
    flow = dy.astype(np.float64).reshape(y.shape)
    for start, end in zip(bounds, bounds[1:], strict=False):
        at, hidden = slice(start, end), np.triu(np.ones((end - start, end - start), bool), 1)
        for h in range(heads):
            scores = np.where(hidden, -np.inf, q[at, h] @ k[at, h].T / np.sqrt(d))
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            y[at, h] = p @ v[at, h]
            dp = flow[at, h] @ v[at, h].T
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(d)
            back[at, 0, h], back[at, 1, h] = ds @ k[at, h], ds.T @ q[at, h]
            back[at, 2, h] = p.T @ flow[at, h]
    back[:, 0], back[:, 1] = turn(back[:, 0], -1), turn(back[:, 1], -1)
    return y.reshape(tokens, -1), back.reshape(tokens, -1)


@pytest.mark.parametrize(
    ("lengths", "heads", "d"),
    [
        ((1,), 1, 2),
        ((5, 1, 3), 2, 6),
        ((32, 33), 3, 16),
        ((100, 7, 64), 2, 64),
        ((70,), 2, 128),
        ((50, 31), 1, 20),
    ],
)
def test_text_attention(native, rng, lengths, heads, d):
    bounds = np.cumsum((0, *lengths)).astype(np.int32)
    tokens = int(bounds[-1])
    qkv, dy = normal(rng, tokens, 3 * heads * d), normal(rng, tokens, heads * d)
    angles = rng.random((tokens, d // 2)) * 6
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    number = np.zeros(heads, np.float32)

    def once():
        y, peak = run(
            native, "QwenTextAttention", [qkv, cos, sin, bounds, number], (tokens, heads * d), (heads, tokens)
        )
        inputs = [qkv, cos, sin, bounds, y, peak, dy]
        return y, *run(native, "QwenTextAttentionGrad", inputs, qkv.shape)

    y, dqkv = on_threads(native, once)
    want, back = attention_truth(qkv, cos, sin, bounds, heads, dy)
    np.testing.assert_allclose(y, want, atol=3e-6, rtol=3e-6)
    np.testing.assert_allclose(dqkv, back, atol=2e-6 * np.abs(back).max() + 3e-6, rtol=3e-6)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 3, 5], [0, 6, 5], [0]])
def test_text_attention_refuses_bounds_that_do_not_cover_the_tokens(native, bounds):
    shapes = [(5, 24), (5, 2), (5, 2)]
    inputs = [np.zeros(shape, np.float32) for shape in shapes]
    inputs += [np.array(bounds, np.int32), np.zeros(2, np.float32), np.zeros((5, 8), np.float32)]
    assert native.bind("QwenTextAttention", inputs, np.zeros((2, 5), np.float32))() in (
        BAD_ARGUMENT,
        BAD_INDEX,
    )


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (3, 5, 7), (14, 192, 32), (29, 193, 33), (15, 400, 100), (70, 1000, 64), (1, 577, 31)],
)
def test_product(native, rng, m, k, n):
    a, b = normal(rng, m, k), normal(rng, k, n)
    (c,) = on_threads(native, lambda: run(native, "QwenProduct", [a, b], (m, n)))
    wide = a.astype(np.float64), b.astype(np.float64)
    scale = np.abs(wide[0]) @ np.abs(wide[1])
    assert (np.abs(c - wide[0] @ wide[1]) <= 1e-6 * scale).all()


def test_product_refuses_what_does_not_fit(native, rng):
    inputs = [normal(rng, 2, 3), normal(rng, 4, 5)]
    assert native.bind("QwenProduct", inputs, np.zeros((2, 5), np.float32))() == BAD_ARGUMENT
