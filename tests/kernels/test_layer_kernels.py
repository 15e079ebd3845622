"""The whole layer as one operator gives the bits of the operators it is made of, however its tokens are cut up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.kernels import attention_cases, cpu_truth, quant_cases
from tests.kernels.native_library import native_on

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
HEADS, D, WIDE, TOKENS, BLOCK_SIZE = 2, 32, 80, 20, 16
HIDDEN = HEADS * D
EPS = 1e-6
FLOATS = {"float32": 0, "bfloat16": 1, "float16": 2}
PACKED = 3
CACHES = {"float32": 0, "bfloat16": 1, "int8": 2}
BLOCKS = [2, 0]


native = native_on()


@dataclass(frozen=True)
class Dense:
    """A matrix in a float format, with the interface of quant_cases.Matrix as far as it is used here."""

    fmt: str
    weight: np.ndarray

    @property
    def shape(self):
        return self.weight.shape

    def inputs(self, bias):
        return [self.weight, *bias]

    def plan(self, bias):
        return [FLOATS[self.fmt], 0, 0, 0, 0, 0, len(bias), *self.shape]

    def apply(self, native, x, bias, residual, exact):
        y = np.full((len(x), self.shape[0]), np.nan, np.float32)
        name = f"QwenLinear{'Bias' if bias else ''}{cpu_truth.SUFFIX[self.fmt]}"
        assert native.bind(name, [x, self.weight, *bias], y)() == 0
        return y if residual is None else y + residual


@dataclass(frozen=True)
class Packed:
    """A matrix of integers."""

    matrix: quant_cases.Matrix

    @property
    def shape(self):
        return self.matrix.shape

    def inputs(self, bias):
        arrays = self.matrix.arrays
        return [*(arrays[name] for name in ("weight", "scales", "zeros", "order") if name in arrays), *bias]

    def plan(self, bias):
        scheme, arrays = self.matrix.scheme, self.matrix.arrays
        flags = [int("zeros" in arrays), int("order" in arrays), int(self.matrix.wide), len(bias)]
        return [PACKED, scheme.bits, scheme.group, *flags, *self.shape]

    def apply(self, native, x, bias, residual, exact):
        nothing = quant_cases.NOTHING
        name = "QwenTestFloatLinear" if exact else "QwenTestQuantLinear"
        added = [bias[0] if bias else nothing, nothing if residual is None else residual]
        return quant_cases.run(native, x, self.matrix, *added, name=name)


def matrix(rng, text, n, k, order=False):
    if text in FLOATS:
        return Dense(text, cpu_truth.stored(rng.standard_normal((n, k)) / np.sqrt(k), text))
    return Packed(quant_cases.matrix(rng, text, n, k, order))


@dataclass(frozen=True)
class Weights:
    """One layer: norms and (matrix, bias) in the order of the operator's inputs."""

    norms: list[np.ndarray]
    matrices: list[tuple[Dense | Packed, list[np.ndarray]]]


def weights(rng, texts, order=False):
    shapes = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    made = [matrix(rng, text, *shape, order) for text, shape in zip(texts, shapes, strict=True)]
    bias = rng.standard_normal(3 * HIDDEN).astype(np.float32)
    norms = [rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32) for _ in range(2)]
    return Weights(norms, list(zip(made, [[bias], [], [], [], []], strict=True)))


def one_operator(native, w, x, call, exact):
    """The layer as the library has it."""
    epsilon = int(np.float32(EPS).view(np.int32))
    cache = CACHES[attention_cases.format_of(call.cache)]
    plan = [epsilon, exact, cache, HEADS, D, BLOCK_SIZE, len(call.cache["value_cache"]), 1]
    inputs = []
    for m, bias in w.matrices:
        plan += m.plan(bias)
        inputs += m.inputs(bias)
    step = [value for name, value in call.arrays.items() if name != "qkv"]
    y = np.full_like(x, np.nan)
    arrays = [x, np.array(plan, np.int32), *step, *call.cache.values(), *w.norms, *inputs]
    assert native.bind("QwenTestLayer", arrays, y)() == 0
    return y


def several_operators(native, w, x, call, exact):
    """The layer from operators that have tests of their own."""

    def norm(x, weight):
        y = np.empty_like(x)
        assert native.bind("QwenRmsNorm", [x, weight, np.array([EPS], np.float32)], y)() == 0
        return y

    def apply(index, x, residual=None):
        m, bias = w.matrices[index]
        return m.apply(native, x, bias, residual, exact)

    call.arrays["qkv"] = apply(0, norm(x, w.norms[0]))
    code, mixed = call.run(native)
    assert code == 0
    middle = apply(1, mixed, x)
    normed = norm(middle, w.norms[1])
    one, two = apply(2, normed), apply(3, normed)
    gated = np.empty_like(one)
    assert native.bind("QwenSwiGlu", [one, two], gated)() == 0
    return apply(4, gated, middle)


def calls(rng, cache_format):
    """A function (start, length) -> one call on a cache that all its calls share."""
    case = attention_cases.sequence(rng, TOKENS, HEADS, D)
    cache = attention_cases.empty_cache(3, BLOCK_SIZE, HEADS, D, cache_format)
    return lambda start, length: attention_cases.step([(case, start, length, BLOCKS)], cache)


def check(native, texts, exact=0, order=False, cache_format="float32"):
    rng = np.random.default_rng(5)
    w = weights(rng, texts, order)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    state = rng.bit_generator.state
    results = []
    for run, sizes in ((several_operators, [20]), (one_operator, [20]), (one_operator, [7, 1, 1, 11])):
        rng.bit_generator.state = state
        call, start, parts = calls(rng, cache_format), 0, []
        for size in sizes:
            parts.append(run(native, w, x[start : start + size], call(start, size), exact))
            start += size
        results.append(np.concatenate(parts))
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(results[1], results[0], err_msg="operators of their own")
    np.testing.assert_array_equal(results[2], results[0], err_msg="chunks")


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize(
    "text", ["float32", "bfloat16", "float16", "int8", "int4", "int4-g64-asym", "int8x16", "int4x16"]
)
def test_layer(native, text, exact):
    check(native, [text] * 5, exact)


@pytest.mark.parametrize("cache_format", ["bfloat16", "int8"])
def test_cache_formats(native, cache_format):
    check(native, ["int4"] * 4 + ["int4x16"], cache_format=cache_format)


@pytest.mark.parametrize("exact", [0, 1])
def test_act_order(native, exact):
    """Each matrix has an order of its own, so w1 and w2 cannot share their inputs."""
    check(native, ["int4-asym"] * 5, exact, order=True)


@pytest.mark.parametrize(
    "texts",
    [
        ["int8", "int4", "int4", "int4-g64", "bfloat16"],
        ["bfloat16", "int8", "int8", "float16", "int4"],
        ["int4", "float32", "int4", "int4-asym", "int8"],
    ],
    ids=",".join,
)
def test_a_format_for_each_matrix(native, texts):
    check(native, texts)
