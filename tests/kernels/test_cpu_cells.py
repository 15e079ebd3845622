"""The cpu backend inside MindSpore: one dynamic graph, mapped weights, caches written in place, clear errors."""

from __future__ import annotations

import gc

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError, KernelError
from research.qwen.kernels.api import CacheSpec, StepView, load_kernels
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.cpu import _quota
from research.qwen.model.loading import is_cache
from tests.kernels import attention_cases as cases
from tests.kernels import cpu_truth as truth

pytestmark = pytest.mark.mindspore
CONFIG = QwenConfig(100, 32, 2, 2, 96, kv_channels=16, seq_length=64)
CACHE = CacheSpec(num_blocks=40, block_size=4)
HIDDEN = 32


class Net(nn.Cell):
    """Two attention layers and every other cell, in all three storage formats."""

    def __init__(self, kernels):
        super().__init__()
        self.wte = kernels.embedding(100, HIDDEN, "bfloat16")
        self.norm = kernels.rms_norm(HIDDEN, 1e-6)
        self.qkv = nn.CellList(
            [
                kernels.linear(HIDDEN, 3 * HIDDEN, bias, fmt)
                for bias, fmt in ((True, "float16"), (False, "bfloat16"))
            ]
        )
        self.attend = nn.CellList([kernels.attention(CONFIG, CACHE) for _ in range(2)])
        self.w1 = kernels.linear(HIDDEN, 48, False, "float32")
        self.w2 = kernels.linear(HIDDEN, 48, False, "float16")
        self.swiglu = kernels.swiglu()
        self.out = kernels.linear(48, HIDDEN, False, "bfloat16")

    def construct(self, ids, *step):
        x = self.wte(ids)
        for layer in range(2):
            x = x + self.attend[layer](self.qkv[layer](self.norm(x)), step)
        return x + self.out(self.swiglu(self.w1(x), self.w2(x)))


SHAPES = {
    "wte.weight": ((100, HIDDEN), "bfloat16"),
    "norm.weight": ((HIDDEN,), "float32"),
    "qkv.0.weight": ((3 * HIDDEN, HIDDEN), "float16"),
    "qkv.0.bias": ((3 * HIDDEN,), "float32"),
    "qkv.1.weight": ((3 * HIDDEN, HIDDEN), "bfloat16"),
    "w1.weight": ((48, HIDDEN), "float32"),
    "w2.weight": ((48, HIDDEN), "float16"),
    "out.weight": ((HIDDEN, 48), "bfloat16"),
}


class Loaded:
    """A net whose weights are mapped from one file, at addresses that are multiples of 2 only."""

    def __init__(self, folder):
        ms.set_context(mode=ms.GRAPH_MODE)
        self.kernels = load_kernels("cpu", threads=2)
        self.net = Net(self.kernels)
        rng = np.random.default_rng(3)
        self.weights = {n: truth.stored(rng.standard_normal(s) / 3, fmt) for n, (s, fmt) in SHAPES.items()}
        path, offset, self.addresses = folder / "weights.bin", 2, {}
        path.write_bytes(b"\0\0" + b"".join(w.tobytes() + b"\0\0" for w in self.weights.values()))
        mapped = np.memmap(path, np.uint8, mode="r")
        parameters = {p.name: p for p in self.net.get_parameters()}
        for name, w in self.weights.items():
            array = mapped[offset : offset + w.nbytes].view(w.dtype).reshape(w.shape)
            parameters[name].set_data(self.kernels.parameter(array, SHAPES[name][1]), slice_shape=True)
            self.addresses[name] = (parameters[name].data_ptr(), array.ctypes.data)
            offset += w.nbytes + 2
        del mapped, array
        gc.collect()
        self.net.set_train(False)
        ids = Tensor(shape=[None], dtype=ms.int32)
        self.net.set_inputs(ids, *self.kernels.step_signature(CONFIG, CACHE))

    def run(self, *runs):
        """Each run is (ids, start, blocks)."""
        view = StepView(
            [start for _, start, _ in runs],
            [len(ids) for ids, _, _ in runs],
            [1.0] * len(runs),
            [blocks for *_, blocks in runs],
        )
        ids = np.concatenate([ids for ids, _, _ in runs]).astype(np.int32)
        return self.net(Tensor(ids), *self.kernels.make_step(view, CONFIG, CACHE)).asnumpy()

    def caches(self):
        """Keys and values of both layers by slot, copied."""
        return [array.copy() for layer in self.net.attend for array in layer.read_cache()]

    def expect(self, ids):
        """One sequence from position 0 in float64."""
        w = self.weights
        x = widen(w["wte.weight"], "bfloat16")[ids].astype(np.float64)
        angle = np.arange(len(ids))[:, None] / 1e4 ** (np.arange(0, 16, 2) / 16)
        for layer, fmt in enumerate(("float16", "bfloat16")):
            normed = truth.rms_norm(x, w["norm.weight"], 1e-6)
            qkv = truth.linear(normed, w[f"qkv.{layer}.weight"], fmt, w.get(f"qkv.{layer}.bias"))
            case = {"qkv": qkv, "cos": np.cos(angle), "sin": np.sin(angle), "logn": np.ones(len(ids))}
            x = x + truth.attention(case, 2, 16)
        gated = truth.swiglu(
            truth.linear(x, w["w1.weight"], "float32"), truth.linear(x, w["w2.weight"], "float16")
        )
        return x + truth.linear(gated, w["out.weight"], "bfloat16")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Loaded(tmp_path_factory.mktemp("weights"))


IDS = np.random.default_rng(5).integers(0, 100, 40)


def test_one_graph_serves_prefill_chunks_and_decode(loaded):
    whole = loaded.run((IDS[:23], 0, [5, 3, 9, 1, 0, 2]))
    np.testing.assert_allclose(whole, loaded.expect(IDS[:23]), rtol=0, atol=2e-5)
    blocks = [10, 11, 12, 13, 14, 15]
    pieces = [loaded.run((IDS[a:b], a, blocks)) for a, b in ((0, 7), (7, 8), (8, 23))]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    loaded.run((IDS[1:7], 0, [20, 21]), (IDS[2:14], 0, [22, 23, 24, 25]))
    mixed = loaded.run(
        (IDS[23:24], 23, [5, 3, 9, 1, 0, 2]),
        (IDS[7:8], 6, [20, 21]),
        (IDS[14:15], 12, [22, 23, 24, 25]),
        (IDS[:23], 0, [30, 31, 32, 33, 34, 35]),
    )
    np.testing.assert_array_equal(mixed[3:], whole)
    np.testing.assert_allclose(mixed[0], loaded.expect(IDS[:24])[-1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(mixed[1], loaded.expect(IDS[1:8])[-1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(mixed[2], loaded.expect(IDS[2:15])[-1], rtol=0, atol=2e-5)
    assert len(loaded.net.compile_cache) == 1


def test_weights_stay_where_they_are_mapped(loaded):
    for name, (parameter, array) in loaded.addresses.items():
        assert parameter == array, name
    offsets = {address % 4 for address, _ in loaded.addresses.values()}
    assert 2 in offsets, "the case must hold unaligned weights"
    for parameter in loaded.net.get_parameters():
        if parameter.name in loaded.weights:
            np.testing.assert_array_equal(parameter.asnumpy(), loaded.weights[parameter.name])


def test_every_layer_writes_its_own_cache_in_place(loaded):
    loaded.run((IDS[:4], 0, [39]))
    parameters = [p for p in loaded.net.get_parameters() if is_cache(p.name)]
    assert len(parameters) == 4 and not any(p.requires_grad for p in parameters)
    rows = [array[39 * 4 : 40 * 4] for array in loaded.caches()]
    for i, row in enumerate(rows):
        assert np.abs(row).min(axis=(1, 2)).all()
        assert all(not np.array_equal(row, other) for other in rows[:i])
    before = loaded.caches()
    loaded.run((IDS[4:5], 0, [38]))
    for old, new in zip(before, loaded.caches(), strict=True):
        np.testing.assert_array_equal(np.flatnonzero((old != new).any(axis=(1, 2))), [38 * 4])


def test_untouched_cache_costs_no_memory():
    kernels = load_kernels("cpu")
    before = resident_bytes()
    cell = kernels.attention(CONFIG, CacheSpec(num_blocks=1 << 19, block_size=4))
    assert resident_bytes() - before < 64 << 20
    assert cell.value_cache.shape == (1 << 19, 2, 4, 16)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize(
    "view, message",
    [
        (StepView([0], [5], [1.0], [[0, 40]]), "0..39"),
        (StepView([0], [5], [1.0], [[0, -1]]), "0..39"),
        (StepView([0], [5], [1.0], [[0]]), "5 tokens"),
        (StepView([0], [0], [1.0], [[0]]), "at least one token"),
        (StepView([-1], [2], [1.0], [[0]]), "positions"),
        (StepView([], [], [], []), "at least one token"),
    ],
)
def test_a_step_outside_the_cache_is_refused(loaded, view, message):
    with pytest.raises(KernelError, match=message):
        loaded.kernels.make_step(view, CONFIG, CACHE)


def test_formats_are_checked(loaded):
    with pytest.raises(ConfigError, match="int3"):
        loaded.kernels.linear(8, 8, False, "int3")
    with pytest.raises(KernelError, match="uint16"):
        loaded.kernels.parameter(np.zeros((2, 2), np.float32), "bfloat16")


def test_a_weight_that_was_not_loaded_is_named_before_anything_runs(loaded):
    cell = loaded.kernels.linear(8, 4, False, "float32")
    with pytest.raises(ValueError, match=r"\(1, 1\), expected \(4, 8\)"):
        cell(Tensor(np.ones((2, 8), np.float32)))


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5, True, "2"])
def test_invalid_threads(threads):
    with pytest.raises(KernelError, match="threads"):
        load_kernels("cpu", threads=threads)


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("QWEN_THREADS", "1")
    assert load_kernels("cpu").threads == 1
    monkeypatch.setenv("QWEN_THREADS", "many")
    with pytest.raises(KernelError, match="QWEN_THREADS"):
        load_kernels("cpu")


@pytest.mark.parametrize(
    "text, cpus", [("max 100000", 1024), ("250000 100000", 2), ("50000 100000", 1), ("", 1024)]
)
def test_threads_respect_the_quota_of_a_container(tmp_path, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    assert _quota(tmp_path / "cpu.max") == cpus
    assert _quota(tmp_path / "missing") == 1024


class Flat(nn.Cell):
    """An attention cell with the tensors of a step as inputs of their own, as dynamic shapes need them."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, qkv, *step):
        return self.cell(qkv, step)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8"])
def test_attention_in_every_cache_format(fmt, backend):
    """The cell of a backend by prefill and steps: what it keeps and what it gives, against the NumPy model."""
    ms.set_context(mode=ms.GRAPH_MODE)
    kernels, cache, blocks = load_kernels(backend), CacheSpec(6, 16, fmt), [4, 0, 3]
    cell = kernels.attention(CONFIG, cache)
    net = Flat(cell)
    net.set_inputs(Tensor(shape=[None, 96], dtype=ms.float32), *kernels.step_signature(CONFIG, cache))
    case = cases.sequence(np.random.default_rng(2), 40, 2, 16)
    angle = np.arange(40)[:, None] / 1e4 ** (np.arange(0, 16, 2) / 16)
    case |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    case["logn"] = np.ones(40, np.float32)
    rows = []
    for start, end in ((0, 33), (33, 34), (34, 40)):
        step = kernels.make_step(StepView([start], [end - start], [1.0], [blocks]), CONFIG, cache)
        rows.append(net(Tensor(case["qkv"][start:end]), *step).asnumpy())
    np.testing.assert_allclose(
        np.concatenate(rows), cases.expected(case, 2, 16, fmt), rtol=0, atol=2e-3 if fmt == "int8" else 5e-4
    )
    slots = np.concatenate([np.arange(16) + 16 * block for block in blocks])[:40]
    _, values = cell.read_cache()
    v = np.ascontiguousarray(case["qkv"][:, 64:].reshape(40, 2, 16))
    np.testing.assert_allclose(values[slots], cases.stored(v, fmt), rtol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unknown_cache_format(backend):
    with pytest.raises(KernelError, match="keys and values as .* not 'int3'"):
        load_kernels(backend).attention(CONFIG, CacheSpec(4, 16, "int3"))
