"""Models and views for the tests of the ascend backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from research.qwen.config import QwenConfig
from research.qwen.decode.loop import Chunk
from research.qwen.errors import KernelError
from research.qwen.kernels import ascend, reference
from research.qwen.kernels.api import CacheSpec, StepView
from research.qwen.model.loading import TensorSource
from research.qwen.model.quantise import Plan, quantised_source
from research.qwen.model.runtime import Runtime
from research.qwen.quant.schemes import Scheme, dequantize_packed, pack, quantize
from research.qwen.weights.names import expected
from research.qwen.weights.readers import open_checkpoint
from tests.kernels.ascend_standins import standins

CACHE = CacheSpec(num_blocks=48, block_size=16)
TINY = QwenConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=96,
    kv_channels=16,
    seq_length=24,
    max_position_embeddings=512,
)

SCHEMES = [
    "int8",
    "int4",
    "int4-g64",
    "int4-asym",
    "int4-g64-asym",
    "int8-g128",
    "int8-g64",
    "int8-g128-asym",
    "int8-g64-asym",
]
FORMATS = SCHEMES + [f"{scheme}-order" for scheme in SCHEMES]
# Several groups in every matrix, and a last one that is not full (192 = 128 + 64, 160 = 2 * 64 + 32).
GROUPED = dataclasses.replace(TINY, hidden_size=192, kv_channels=48, intermediate_size=320)


class RandomWeights:
    """A checkpoint of random float32 tensors; no reader involved."""

    def __init__(self, config: QwenConfig, seed: int = 0):
        random = np.random.default_rng(seed)
        self.tensors = {
            name: random.normal(0.0, 0.3, shape).astype(np.float32)
            for name, shape in expected(config).items()
        }

    def names(self):
        return list(self.tensors)

    def format(self, name):
        return "float32"

    def read(self, name):
        return self.tensors[name]


class QuantWeights(RandomWeights):
    """Random weights whose matrices are quantised; ``formats``: end of a name -> scheme, "-order" with act-order.

    ``plain()`` is the same model with the dequantised matrices in float32.
    """

    def __init__(self, config: QwenConfig, formats: dict[str, str], seed: int = 0):
        super().__init__(config, seed)
        self.formats: dict[str, str] = {}
        self.floats = dict(self.tensors)
        for name, values in list(self.tensors.items()):
            fmt = next((fmt for end, fmt in formats.items() if name.endswith(end)), None)
            if fmt is None or values.ndim != 2:
                continue
            arrays = packed(values, fmt, seed)
            scheme = Scheme.parse(fmt.removesuffix("-order"))
            self.formats[name] = str(scheme)
            self.floats[name] = dequantize_packed(arrays, scheme, *values.shape)
            stem = name.removesuffix("weight")
            del self.tensors[name]
            self.tensors |= {stem + part: array for part, array in arrays.items()}

    def format(self, name):
        return self.formats.get(name, "float32")

    def plain(self) -> RandomWeights:
        plain = RandomWeights.__new__(RandomWeights)
        plain.tensors = self.floats
        return plain


def packed(values: np.ndarray, fmt: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed arrays of a matrix; with "-order" its inputs are stored in a random order."""
    scheme = Scheme.parse(fmt.removesuffix("-order"))
    if not fmt.endswith("-order"):
        return pack(quantize(values, scheme), scheme)
    order = np.random.default_rng(seed).permutation(values.shape[1])
    return pack(quantize(values[:, order], scheme), scheme, order)


def stored(folder: Path) -> tuple[QwenConfig, TensorSource]:
    """Config and weights of a checkpoint folder, as they are stored."""
    config = QwenConfig.from_folder(folder)
    return config, quantised_source(open_checkpoint(folder), config, Plan())


def random_matrix(n, k, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, (n, k)).astype(np.float32)


def loaded(kernels, arrays, fmt, n, k, bias=None) -> nn.Cell:
    """The linear cell with its parameters set as the loader does it; every parameter is set, and nothing else."""
    cell = kernels.linear(k, n, bias is not None, fmt)
    tensors = kernels.quantised_parameters(arrays, fmt, n, k)
    parameters = {name: p for name, p in cell.parameters_and_names() if name != "bias"}
    assert set(tensors) == set(parameters)
    for name, value in tensors.items():
        assert value.dtype == parameters[name].dtype and value.ndim == parameters[name].ndim
        parameters[name].set_data(value, slice_shape=True)
    if bias is not None:
        cell.bias.set_data(kernels.parameter(bias, "float32"), slice_shape=True)
    return cell


def linear_cosines(kernels, formats, n: int = 1024, k: int = 1000) -> dict[str, float]:
    """Cosine of the quantised product with the dequantised matrix's, per format; KernelError formats left out."""
    random = np.random.default_rng(0)
    matrix, x = random.normal(0, 0.05, (n, k)).astype(np.float32), random.normal(size=(7, k))
    cosines = {}
    for fmt in formats:
        try:
            arrays = packed(matrix, fmt)
            cell = loaded(kernels, arrays, fmt, n, k)
        except KernelError:
            continue
        got = cell(Tensor(x, getattr(ms, kernels.activation_dtype))).asnumpy().astype(np.float64)
        want = x @ dequantize_packed(arrays, Scheme.parse(fmt.removesuffix("-order")), n, k).T.astype(
            np.float64
        )
        cosines[fmt] = float((got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want))
    return cosines


def ascend_runtime(config=TINY, dtype="float32", ops=None, source=None, cache=CACHE, **options) -> Runtime:
    """The Ascend model on stand-ins (float32), or with MindSpore's operators for any other dtype."""
    if dtype == "float32" and ops is None:
        ops = standins()
    kernels = ascend.build(dtype, ops=ops, require_device=False, **options)
    return Runtime.load(config, source or RandomWeights(config), kernels, cache)


def reference_runtime(config=TINY, source=None, cache=CACHE) -> Runtime:
    """The same model on the judge."""
    return Runtime.load(config, source or RandomWeights(config), reference.build(), cache)


def view(starts, q_lens, alphas=None, first_blocks=None) -> StepView:
    """Runs whose sequences own six blocks each, unless said otherwise."""
    first = first_blocks or [6 * i for i in range(len(starts))]
    tables = [list(range(b, b + 6)) for b in first]
    return StepView(starts, q_lens, alphas or [1.0] * len(starts), tables)


PREFILL = view([0, 0], [3, 5])
MIXED = view([4, 0, 9], [1, 6, 3])


def graph_inputs(runtime: Runtime, step_view: StepView):
    """What the model's graph gets for a view: ids, rows and the step."""
    total = sum(step_view.q_lens)
    ids = Tensor.from_numpy((np.arange(total) % runtime.vocab_size).astype(np.int32))
    rows = Tensor.from_numpy(np.arange(total, dtype=np.int32))
    return ids, rows, *runtime.kernels.make_step(step_view, runtime.config, runtime.cache)


def run_script(runtime: Runtime, ids: dict[str, list[int]], steps, alphas=None) -> list[np.ndarray]:
    """Logits of every pass: ``steps`` is a list of passes, a pass a list of (sequence, tokens to feed)."""
    blocks = {name: list(range(12 * i, 12 * i + 12)) for i, name in enumerate(ids)}
    done = dict.fromkeys(ids, 0)
    out = []
    for step in steps:
        chunks = []
        for name, count in step:
            start = done[name]
            part = ids[name][start : start + count]
            assert len(part) == count
            alpha = alphas[name] if alphas else runtime.rope_alpha(len(ids[name]))
            chunks.append(Chunk(part, start, blocks[name], alpha, count))
            done[name] += count
        out.append(runtime.forward(chunks))
    return out
