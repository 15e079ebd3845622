"""Paged attention in C++ against float64, in every cache format, on every instruction set this processor has."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.kernels.native import ISAS
from tests.kernels import attention_cases as cases
from tests.kernels import cpu_truth as truth
from tests.kernels.native_library import native_on

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
BAD_ARGUMENT = 1
BAD_INDEX = 2
PART = 512  # kPart of csrc/attention.h


def bound(native, fmt):
    """Largest error against float64: tiles take queries and weights in 16 bits."""
    return 3e-5 if native.isa == "amx" and fmt == "bfloat16" else 5e-6


native = native_on(isa for isa in ISAS if isa in ("amx", "avx512", "avx2", "base"))


@pytest.fixture(params=cases.FORMATS)
def fmt(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def done(call, native):
    code, y = call.run(native)
    assert code == 0
    assert np.isfinite(y).all()
    return y


def split(total, sizes):
    """Starts and lengths of chunks; the last size is repeated."""
    start = 0
    for i in range(total):
        if start == total:
            return
        size = min(sizes[min(i, len(sizes) - 1)], total - start)
        yield start, size
        start += size


SHAPES = [(1, 2), (3, 6), (4, 16), (2, 8), (2, 32), (2, 128), (1, 96)]  # heads, d
BLOCK_SIZES = [(shape, 16) for shape in SHAPES] + [((2, 32), size) for size in (1, 3, 4, 8, 24, 32)]


@pytest.mark.parametrize("shape, block_size", BLOCK_SIZES)
def test_attention(native, rng, fmt, shape, block_size):
    heads, d = shape
    for length in (1, 3, 65, 150):
        case = cases.sequence(rng, length, heads, d)
        blocks = list(rng.permutation(160 // block_size + 1)[: -(-length // block_size)])
        call = cases.step(
            [(case, 0, length, blocks)], cases.empty_cache(160 // block_size + 1, block_size, heads, d, fmt)
        )
        y = done(call, native)
        np.testing.assert_allclose(y, cases.expected(case, heads, d, fmt), rtol=0, atol=bound(native, fmt))


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
@pytest.mark.parametrize("d", [6, 32])
def test_the_cache_holds_what_its_format_can_keep(native, rng, fmt, d, block_size):
    """Exactly the numbers of the NumPy model, in the slots of the call and nowhere else."""
    heads, length = 3, 45
    case = cases.sequence(rng, length, heads, d)
    v = case["qkv"][:, 2 * heads * d :].reshape(length, heads, d)
    v[3, 1] = 0
    v[4, 1] = 1e-36
    v[5, 1, 0] = 1e30
    v[6] = rng.integers(-254, 255, (heads, d)) / 2  # halves: ties are rounded to even
    v[6, :, 0] = 127
    blocks = list(rng.permutation(64 // block_size)[: -(-length // block_size)])
    call = cases.step(
        [(case, 0, length, blocks)], cases.empty_cache(64 // block_size, block_size, heads, d, fmt)
    )
    assert call.run(native)[0] == 0
    keys, values = cases.cached(call)
    rotated = cases.rotated_keys(case, heads, d)
    np.testing.assert_array_equal(values, cases.stored(np.ascontiguousarray(v), fmt))
    np.testing.assert_array_equal(keys, cases.stored(rotated, fmt))
    every = cases.read_cache(call.cache)
    for array in every:
        untouched = np.delete(array, call.slots, axis=0)
        assert np.isnan(untouched).all()


def test_int8_codes_and_scales(native, rng):
    heads, d = 2, 40
    case = cases.sequence(rng, 16, heads, d)
    call = cases.step([(case, 0, 16, [0])], cases.empty_cache(1, 16, heads, d, "int8"))
    done(call, native)
    codes, scales = cases.int8_codes(case["qkv"][:, 2 * heads * d :].reshape(16, heads, d))
    np.testing.assert_array_equal(call.cache["value_cache"][0].swapaxes(0, 1), codes)
    np.testing.assert_array_equal(call.cache["value_scales"][0].T, scales[..., 0])
    assert np.abs(codes).max(-1).min() == 127


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("chunks", [[1], [64], [3, 70, 77], [149, 1], [2, 4, 5, 12, 17, 20, 24, 25]], ids=str)
def test_chunks_do_not_change_a_bit(native, rng, fmt, chunks, block_size):
    heads, d, count = 2, 20, -(-150 // block_size)
    case = cases.sequence(rng, 150, heads, d)
    blocks = list(rng.permutation(count))
    want = done(
        cases.step([(case, 0, 150, blocks)], cases.empty_cache(count, block_size, heads, d, fmt)), native
    )
    cache = cases.empty_cache(count, block_size, heads, d, fmt)
    for start, size in split(150, chunks):
        y = done(cases.step([(case, start, size, blocks)], cache), native)
        np.testing.assert_array_equal(y, want[start : start + size])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads, d", [(1, 32), (5, 16)])
def test_long_contexts(native, rng, fmt, heads, d, threads):
    """Contexts of several parts: against float64, and decode against prefill, split among threads or not."""
    length, block_size = 3 * PART + 40, 16
    case = cases.sequence(rng, length, heads, d)
    blocks = list(rng.permutation(-(-length // block_size)))
    cache = cases.empty_cache(len(blocks), block_size, heads, d, fmt)
    native.set_threads(threads)
    try:
        want = done(cases.step([(case, 0, length, blocks)], cache), native)
        np.testing.assert_allclose(want, cases.expected(case, heads, d, fmt), rtol=0, atol=bound(native, fmt))
        for position in (PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART + 63, length - 1):
            y = done(cases.step([(case, position, 1, blocks)], cache), native)
            np.testing.assert_array_equal(y[0], want[position])
        y = done(cases.step([(case, 2 * PART - 5, 10, blocks)], cache), native)
        np.testing.assert_array_equal(y, want[2 * PART - 5 : 2 * PART + 5])
    finally:
        native.set_threads(2)


@pytest.mark.parametrize("block_size, threads", [(4, 2), (16, 1), (16, 2), (16, 5)])
def test_neighbours_do_not_change_a_bit(native, rng, fmt, threads, block_size):
    """Sequences together, in prefill, in a chunk, in decode (short and of several parts), against each alone."""
    heads, d = 3, 16
    plans = [(100, 0, 100), (90, 60, 30), (70, 69, 1), (2, 1, 1), (1, 0, 1), (PART + 90, PART + 89, 1)]
    counts = [-(-total // block_size) for total, _, _ in plans]
    free = iter(rng.permutation(sum(counts)))
    runs = [
        (cases.sequence(rng, total, heads, d), start, length, [next(free) for _ in range(count)])
        for (total, start, length), count in zip(plans, counts, strict=True)
    ]
    cache = cases.empty_cache(sum(counts), block_size, heads, d, fmt)
    for case, start, _, blocks in runs:
        if start:
            done(cases.step([(case, 0, start, blocks)], cache), native)
    native.set_threads(threads)
    try:
        y = done(cases.step(runs, cache), native)
        row = 0
        for run in runs:
            alone = done(cases.step([run], cache), native)
            np.testing.assert_array_equal(y[row : row + run[2]], alone)
            row += run[2]
    finally:
        native.set_threads(2)


def test_nothing_outside_the_cache_is_touched(native, rng, fmt):
    """The caches lie between guards; what is read of the guards would be NaN (or a code of -128) in the result."""
    heads, d, length = 2, 20, 37
    case = cases.sequence(rng, length, heads, d)
    plain = cases.empty_cache(3, 16, heads, d, fmt)
    want = done(cases.step([(case, 0, length, [2, 0, 1])], plain), native)
    guarded, guards = {}, []
    for name, array in cases.empty_cache(3, 16, heads, d, fmt).items():
        whole = np.full(array.nbytes + 8192, 0x7F, np.uint8)
        inside = whole[4096:-4096].view(array.dtype).reshape(array.shape)
        inside[...] = array
        guarded[name] = inside
        guards += [whole[:4096], whole[-4096:]]
    np.testing.assert_array_equal(done(cases.step([(case, 0, length, [2, 0, 1])], guarded), native), want)
    for position in (0, 15, 16, 36):
        y = done(cases.step([(case, position, 1, [2, 0, 1])], guarded), native)
        np.testing.assert_array_equal(y[0], want[position])
    assert all((guard == 0x7F).all() for guard in guards)


def test_large_scores_do_not_overflow(native, rng, fmt):
    case = cases.sequence(rng, 130, 1, 8)
    case["qkv"] = case["qkv"] * np.float32(100)
    y = done(cases.step([(case, 0, 130, list(range(9)))], cases.empty_cache(9, 16, 1, 8, fmt)), native)
    assert np.abs(y).max() <= np.abs(case["qkv"]).max() * 1.01
    np.testing.assert_allclose(y[0], cases.stored(case["qkv"][:, 16:], fmt)[0], rtol=1e-6)


@pytest.mark.parametrize("block_size", [2, 16])
def test_wrong_arguments_are_refused_and_nothing_is_written(native, rng, fmt, block_size):
    case = cases.sequence(rng, block_size + 2, 1, 8)
    empty = cases.empty_cache(2, block_size, 1, 8, fmt)
    cache = {name: array.copy() for name, array in empty.items()}
    call = cases.step([(case, 0, block_size + 2, [0, 1])], cache)
    slots = list(call.slots)
    wrong = [{"slots": [*slots[:-1], 2 * block_size]}, {"slots": [*slots[:-1], -1]}]
    wrong += [{"tables": [[0, 2]]}, {"tables": [[-1, 1]]}, {"kv_lens": [2 * block_size + 1]}]
    wrong += [{"q_lens": [block_size + 1]}, {"q_lens": [0]}]
    for change in wrong:
        assert call.changed(**change).run(native)[0] == BAD_INDEX, change
    short = {name: array[:, :, :1] for name, array in cache.items()}
    assert cases.Paged(call.arrays, short).run(native)[0] == BAD_ARGUMENT
    for name, array in cache.items():
        np.testing.assert_array_equal(array, empty[name])


def test_the_reference_of_these_tests(rng):
    """The cases' model of a float32 cache is plain causal attention."""
    case = cases.sequence(rng, 30, 2, 8)
    np.testing.assert_allclose(
        cases.expected(case, 2, 8, "float32"), truth.attention(case, 2, 8), rtol=0, atol=1e-6
    )
