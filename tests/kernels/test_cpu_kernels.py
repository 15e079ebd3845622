"""The C++ kernels against float64, on every instruction set this processor has; called without MindSpore."""

from __future__ import annotations

import platform
import shutil
import threading

import numpy as np
import pytest

from research.qwen.errors import KernelError
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.build import library_path, variants
from research.qwen.kernels.native import ISAS, NativeLibrary
from tests.kernels import cpu_truth as truth

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
BAD_ARGUMENT = 1
BAD_INDEX = 2


@pytest.fixture(scope="module", params=ISAS)
def native(request, tmp_path_factory):
    """The library with one instruction set; a copy of the file is a library of its own to the loader."""
    copy = tmp_path_factory.mktemp("isa") / f"{request.param}.so"
    shutil.copy(library_path(), copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_ISA", request.param)
        try:
            library = NativeLibrary(copy)
        except KernelError as error:
            pytest.skip(str(error))
    assert library.isa == request.param
    library.set_threads(2)
    return library


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def linear(native, x, w, fmt, bias=None):
    name = f"QwenLinear{'' if bias is None else 'Bias'}{truth.SUFFIX[fmt]}"
    y = np.full((len(x), len(w)), np.nan, np.float32)
    assert native.bind(name, [x, w, *([] if bias is None else [bias])], y)() == 0
    return y


def unaligned(array, offset):
    """A copy of an array at an address that is ``offset`` bytes past a multiple of 64."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    first = -raw.ctypes.data % 64 + offset
    view = raw[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def test_at_least_one_instruction_set_is_tested():
    assert NativeLibrary(library_path()).isa in variants(platform.machine())


def test_unknown_instruction_set(tmp_path, monkeypatch):
    shutil.copy(library_path(), tmp_path / "copy.so")
    monkeypatch.setenv("QWEN_ISA", "mmx")
    with pytest.raises(KernelError, match="QWEN_ISA=mmx"):
        NativeLibrary(tmp_path / "copy.so")


def test_damaged_library(tmp_path):
    (tmp_path / "bad.so").write_bytes(b"no library")
    with pytest.raises(KernelError, match="delete it"):
        NativeLibrary(tmp_path / "bad.so")


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
    case = truth.sequence(rng, 150, 4, 16)
    results = []
    for threads in (1, 2, 5, 3):
        native.set_threads(threads)
        assert native.threads == threads
        call = truth.step([(case, 0, 150, list(range(10)))], truth.empty_cache(10, 16, 4, 16))
        attended = call.output()
        assert native.bind("QwenAttention", call.inputs(), attended)() == 0
        results.append((linear(native, x[:1], w, "float32"), linear(native, x, w, "float32"), attended))
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


@pytest.mark.parametrize("heads, d", [(1, 2), (3, 6), (4, 16), (2, 8), (2, 32), (2, 128), (1, 96)])
@pytest.mark.parametrize("length", [1, 3, 64, 65, 200])
def test_attention(native, rng, heads, d, length):
    case = truth.sequence(rng, length, heads, d)
    blocks = list(rng.permutation(14)[: -(-length // 16)])
    call = truth.step([(case, 0, length, blocks)], truth.empty_cache(14, 16, heads, d))
    y = call.output()
    assert native.bind("QwenAttention", call.inputs(), y)() == 0
    np.testing.assert_allclose(y, truth.attention(case, heads, d), rtol=0, atol=5e-6)
    written = np.isfinite(call.keys).all(axis=(2, 3)).reshape(-1)
    assert sorted(np.flatnonzero(written)) == sorted(call.slots)
    v = case["qkv"][:, 2 * heads * d :].reshape(length, heads, d)
    np.testing.assert_array_equal(call.values.reshape(-1, heads, d)[call.slots], v)


@pytest.mark.parametrize("chunks", [[150], [1] * 150, [64, 64, 22], [3, 70, 77], [149, 1]], ids=str)
def test_chunks_do_not_change_a_bit(native, rng, chunks):
    heads, d = 2, 20
    case = truth.sequence(rng, 150, heads, d)
    whole = truth.step([(case, 0, 150, list(range(38)))], truth.empty_cache(38, 4, heads, d))
    want = whole.output()
    assert native.bind("QwenAttention", whole.inputs(), want)() == 0
    cache, start = truth.empty_cache(38, 4, heads, d), 0
    for size in chunks:
        call = truth.step([(case, start, size, list(range(38)))], cache)
        y = call.output()
        assert native.bind("QwenAttention", call.inputs(), y)() == 0
        np.testing.assert_array_equal(y, want[start : start + size])
        start += size


def test_neighbours_do_not_change_a_bit(native, rng):
    """Three sequences together, one in prefill, one in a chunk, one in decode, against each alone."""
    heads, d = 3, 16
    cases = [truth.sequence(rng, n, heads, d) for n in (100, 90, 70)]
    runs = [(cases[0], 0, 100, [3, 9, 1, 20, 4, 0, 30]), (cases[1], 60, 30, [2, 5, 6, 7, 8, 10])]
    runs += [(cases[2], 69, 1, [11, 12, 13, 14, 15])]
    cache = truth.empty_cache(31, 16, heads, d)
    for case, start, _, blocks in runs[1:]:
        earlier = truth.step([(case, 0, start, blocks)], cache)
        assert native.bind("QwenAttention", earlier.inputs(), earlier.output())() == 0
    together = truth.step(runs, cache)
    y = together.output()
    assert native.bind("QwenAttention", together.inputs(), y)() == 0
    row = 0
    for run in runs:
        call = truth.step([run], cache)
        alone = call.output()
        assert native.bind("QwenAttention", call.inputs(), alone)() == 0
        np.testing.assert_array_equal(y[row : row + run[2]], alone)
        row += run[2]


def test_large_scores_do_not_overflow(native, rng):
    case = truth.sequence(rng, 130, 1, 8)
    case["qkv"] = case["qkv"] * np.float32(100)
    call = truth.step([(case, 0, 130, list(range(9)))], truth.empty_cache(9, 16, 1, 8))
    y = call.output()
    assert native.bind("QwenAttention", call.inputs(), y)() == 0
    assert np.isfinite(y).all()
    bound = np.abs(case["qkv"]).max()
    assert np.abs(y).max() <= bound * 1.0001
    np.testing.assert_allclose(y[0], case["qkv"][0, 16:], rtol=1e-6)


def test_wrong_arguments_are_refused_and_nothing_is_written(native, rng):
    x, w = np.ones((2, 8), np.float32), np.ones((3, 9), np.float32)
    assert native.bind("QwenLinearF32", [x, w], np.zeros((2, 3), np.float32))() == BAD_ARGUMENT
    ids = np.array([0, 3], np.int32)
    assert native.bind("QwenEmbeddingF32", [ids, w], np.zeros((2, 9), np.float32))() == BAD_INDEX
    case = truth.sequence(rng, 4, 1, 8)
    call = truth.step([(case, 0, 4, [0, 1])], truth.empty_cache(2, 2, 1, 8))
    for slots in ([0, 1, 2, 4], [0, 1, 2, -1]):
        bad = truth.with_slots(call, slots)
        assert native.bind("QwenAttention", bad.inputs(), bad.output())() == BAD_INDEX
    bad = truth.step([(case, 0, 4, [0, 1])], truth.empty_cache(2, 2, 1, 8))
    bad.tables[0, 1] = 2
    assert native.bind("QwenAttention", bad.inputs(), bad.output())() == BAD_INDEX
    assert np.isnan(bad.keys).all()
