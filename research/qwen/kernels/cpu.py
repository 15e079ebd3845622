"""The cpu backend: C++ kernels (csrc/) inside a GRAPH_MODE graph with dynamic shapes, through ops.Custom aot.

Weights stay in the storage of the checkpoint (float32, bfloat16 as its bits in uint16, float16), may lie in a mapped
file at any alignment, and are widened exactly in registers; activations and sums are float32. A row of a batch equals
the same row computed alone, bit for bit, whatever the number of rows, threads or prefill chunks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import KernelError
from research.qwen.kernels.api import ONE_GRAPH, CacheSpec, FormatOf, StepView, Updates
from research.qwen.kernels.build import library_path
from research.qwen.kernels.cpu_layer import FusedStack, PackedEmbedding, PackedLinear, float_plan
from research.qwen.kernels.cpu_ops import F32, I32, TYPES, operator
from research.qwen.kernels.kv_layout import SUFFIX, cache_arrays, read_cache
from research.qwen.kernels.layer import Layer
from research.qwen.kernels.native import NativeLibrary
from research.qwen.kernels.packing import packing
from research.qwen.kernels.parameters import placeholder, zero_cache
from research.qwen.rope import logn_factors, rotary_tables

# format -> suffix of the kernels' names, NumPy type of the parameter
_FORMATS: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", np.uint16),
    "float16": ("F16", np.float16),
}
ACTIVATIONS = ("auto", "int8", "int16", "float32")


class Linear(nn.Cell):  # type: ignore[misc]
    """x (T, n_in) -> x W^T + b (T, n_out); ``weight`` (n_out, n_in) is a placeholder until it is loaded."""

    def __init__(self, library: Path, n_in: int, n_out: int, bias: bool, fmt: str) -> None:
        super().__init__()
        suffix, dtype = _format(fmt)
        self.fmt, self.kind = fmt, TYPES[dtype]
        self.shape = (n_out, n_in)
        self.weight = placeholder("weight", 2, dtype)
        self.has_bias = bias
        if bias:
            self.bias = placeholder("bias", 1)
        self.kernel = operator(library, f"QwenLinear{'Bias' if bias else ''}{suffix}", F32, *self.types())

    def plan(self) -> list[int]:
        """What the fused layer must know of this matrix."""
        return float_plan(self.fmt, self.has_bias, *self.shape)

    def types(self) -> list[Any]:
        """Registration types of ``inputs``."""
        return [self.kind, *([F32] if self.has_bias else [])]

    def inputs(self) -> tuple[Tensor, ...]:
        """The parameters as inputs of an operator; ValueError at compilation if the weight is not loaded."""
        if self.weight.shape != self.shape:
            raise ValueError(
                f"linear weight has shape {self.weight.shape}, expected {self.shape}; load it first"
            )
        return self.parts()

    def parts(self) -> tuple[Tensor, ...]:
        """The parameters in the order of the kernels' inputs, loaded or not."""
        if self.has_bias:
            return (self.weight, self.bias)
        return (self.weight,)

    def construct(self, x: Tensor) -> Tensor:
        """(T, n_in) float32 -> (T, n_out) float32."""
        return self.kernel(x, *self.inputs())


class Embedding(nn.Cell):  # type: ignore[misc]
    """ids (T,) int32 -> (T, dim) float32; ``weight`` (rows, dim) is a placeholder until it is loaded."""

    def __init__(self, library: Path, rows: int, dim: int, fmt: str) -> None:
        super().__init__()
        suffix, dtype = _format(fmt)
        self.shape = (rows, dim)
        self.weight = placeholder("weight", 2, dtype)
        self.kernel = operator(library, f"QwenEmbedding{suffix}", I32, TYPES[dtype])

    def construct(self, ids: Tensor) -> Tensor:
        """(T,) int32 -> (T, dim) float32; every id must be below the number of rows."""
        if self.weight.shape != self.shape:
            raise ValueError(
                f"embedding weight has shape {self.weight.shape}, expected {self.shape}; load it first"
            )
        return self.kernel(ids, self.weight)


class RmsNorm(nn.Cell):  # type: ignore[misc]
    """x -> x * rsqrt(mean(x^2) + eps) * weight, sums in float32 runs joined in double."""

    def __init__(self, library: Path, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(dim, np.float32)), name="weight", requires_grad=False)
        self.eps = Tensor(np.array([eps], np.float32))
        self.kernel = operator(library, "QwenRmsNorm", F32, F32, F32)

    def construct(self, x: Tensor) -> Tensor:
        """(T, dim) float32 -> (T, dim) float32."""
        return self.kernel(x, self.weight, self.eps)


class SwiGlu(nn.Cell):  # type: ignore[misc]
    """(a, b) -> a * silu(b)."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.kernel = operator(library, "QwenSwiGlu", F32, F32)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (T, width) float32 -> (T, width) float32."""
        return self.kernel(a, b)


class Attention(nn.Cell):  # type: ignore[misc]
    """Rotary, log-n, paged KV cache and causal attention in one kernel; owns its cache.

    ``key_cache``, ``value_cache`` and, for int8, ``key_scales``, ``value_scales`` are parameters told from weights by
    their names, laid out as kv_layout says; memory is committed by the system only as blocks are first written.
    """

    def __init__(self, library: Path, config: QwenConfig, cache: CacheSpec) -> None:
        super().__init__()
        fmt = "float32" if cache.fmt == "auto" else cache.fmt
        layout = cache_arrays(fmt, cache.num_blocks, cache.block_size, config.num_heads, config.head_dim)
        for name, (shape, dtype) in layout.items():
            setattr(self, name, zero_cache(name, shape, dtype))
        self.scaled = fmt == "int8"
        self.names = tuple(layout)
        self.types = [TYPES[dtype] for _, dtype in layout.values()]
        types = (F32, F32, F32, F32, I32, I32, I32, I32, *self.types)
        self.kernel = operator(library, f"QwenAttention{SUFFIX[fmt]}", *types)

    def cache_types(self) -> list[Any]:
        """Registration types of ``caches``."""
        return self.types

    def caches(self) -> tuple[Tensor, ...]:
        """The cache as inputs of a kernel."""
        if self.scaled:
            return (self.key_cache, self.value_cache, self.key_scales, self.value_scales)
        return (self.key_cache, self.value_cache)

    def read_cache(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values (slots, heads, head_dim) as float32."""
        return read_cache({name: getattr(self, name).asnumpy() for name in self.names})

    def construct(self, qkv: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        """qkv (T, 3 * hidden) float32 and the tuple of ``make_step`` -> (T, hidden) float32."""
        cos, sin, logn, slots, tables, q_lens, kv_lens = step
        return self.kernel(qkv, cos, sin, logn, slots, tables, q_lens, kv_lens, *self.caches())


class CpuKernels:
    """Factory of the cells above; see ``kernels.api.Kernels``. Not differentiable: training uses ``reference``."""

    name = "cpu"
    activation_dtype = "float32"

    def __init__(self, library: Path, threads: int, activations: str = "auto") -> None:
        self._library, self._activations = library, activations
        self._exact = activations == "float32"
        native = NativeLibrary(library)
        native.set_threads(threads)
        self.isa = native.isa
        self.threads = threads

    def linear(self, n_in: int, n_out: int, bias: bool, fmt: str) -> Linear | PackedLinear:
        """Cell x (T, n_in) -> (T, n_out); KernelError or ConfigError if the format is unknown."""
        packed = packing(fmt)
        if packed is None:
            return Linear(self._library, n_in, n_out, bias, fmt)
        # Who takes 8 bits for the weights wants accuracy, which 8 bits beside them would halve.
        wide = self._activations == "int16" or (self._activations == "auto" and packed.scheme.bits == 8)
        return PackedLinear(self._library, n_in, n_out, bias, packed, self._exact, wide)

    def embedding(self, rows: int, dim: int, fmt: str) -> Embedding | PackedEmbedding:
        """Cell ids (T,) int32 -> (T, dim) float32; KernelError or ConfigError if the format is unknown."""
        packed = packing(fmt)
        if packed is None:
            return Embedding(self._library, rows, dim, fmt)
        return PackedEmbedding(self._library, rows, dim, packed)

    def layer(self, config: QwenConfig, cache: CacheSpec, prefix: str, fmt: FormatOf) -> Layer:
        """Cell (x, step) -> (T, hidden) from the cells above; ``fuse`` makes one operator of all layers."""
        layer = Layer(config, self, cache, prefix, fmt)
        if self._activations == "auto" and isinstance(layer.mlp.c_proj, PackedLinear):
            # Products of two activations have long tails: 8 bits lose four times as much here as elsewhere.
            layer.mlp.c_proj.widen()
        return layer

    def fuse(self, config: QwenConfig, cache: CacheSpec, layers: Sequence[Layer]) -> FusedStack:
        """Cell (x, rows, step) -> (R, hidden): all layers as one operator."""
        return FusedStack(self._library, config, cache, list(layers), self._exact)

    def adapt(self, layers: Sequence[Layer], adapters: Sequence[Updates]) -> Sequence[Layer]:
        """KernelError: adapters are computed in the fused layers, which see to them themselves."""
        raise KernelError("backend cpu computes adapters in its fused layers only")

    def rms_norm(self, dim: int, eps: float) -> RmsNorm:
        """Cell (T, dim) -> (T, dim)."""
        return RmsNorm(self._library, dim, eps)

    def swiglu(self) -> SwiGlu:
        """Cell (a, b) -> a * silu(b)."""
        return SwiGlu(self._library)

    def attention(self, config: QwenConfig, cache: CacheSpec) -> Attention:
        """Cell (qkv, step) -> (T, hidden) with a cache of its own."""
        return Attention(self._library, config, cache)

    def make_step(self, view: StepView, config: QwenConfig, cache: CacheSpec) -> tuple[Tensor, ...]:
        """(cos, sin, log-n, slots, block tables, q lengths, kv lengths); KernelError for a block outside the cache."""
        check_view(view, cache)
        cos, sin = rotary_tables(view.starts, view.q_lens, view.alphas, config)
        arrays = (
            cos,
            sin,
            logn_factors(view.positions(), config),
            view.slot_mapping(cache.block_size),
            view.padded_tables(cache.block_size),
            np.asarray(view.q_lens, np.int32),
            view.kv_lens(),
        )
        return tuple(Tensor.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def step_signature(
        self, config: QwenConfig, cache: CacheSpec, key: str = ONE_GRAPH
    ) -> tuple[Tensor, ...]:
        """The tuple of make_step with dynamic T, B and table width."""
        half = config.head_dim // 2
        shapes = ([None, half], [None, half], [None], [None], [None, None], [None], [None])
        types = (ms.float32,) * 3 + (ms.int32,) * 4
        return tuple(Tensor(shape=s, dtype=t) for s, t in zip(shapes, types, strict=True))

    def graph_key(self, view: StepView) -> str:
        """One graph serves every view."""
        return ONE_GRAPH

    def quantised_parameters(
        self, arrays: Mapping[str, NDArray[Any]], scheme: str, n: int, k: int, table: bool = False
    ) -> dict[str, Tensor]:
        """Tensors on the packed arrays' own memory."""
        return {name: Tensor.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def parameter(self, array: NDArray[Any], fmt: str) -> Tensor:
        """A tensor on the array's own memory (also read-only and mapped); bfloat16 is given and kept as uint16 bits.

        Raises KernelError if the array's type is not the one of ``fmt``.
        """
        _, dtype = _format(fmt)
        if array.dtype != dtype:
            raise KernelError(f"a {fmt} parameter needs an array of {np.dtype(dtype)}, got {array.dtype}")
        return Tensor.from_numpy(np.ascontiguousarray(array))


def build(threads: int | None = None, activations: str = "auto") -> CpuKernels:
    """Compile (once) and load the kernels.

    ``threads``: default the environment variable QWEN_THREADS, else the physical cores this process may use.
    ``activations``: what packed integer weights are multiplied with: int8 or int16, quantised per token and run of
    inputs, auto, which takes int16 where 8 bits lose most, or float32, exact and slower.

    Raises KernelError without a compiler or for an invalid value.
    """
    if activations not in ACTIVATIONS:
        raise KernelError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    count = default_threads() if threads is None else threads
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise KernelError(f"threads must be an integer of 1 to 1024, got {threads!r}")
    return CpuKernels(library_path(), count, activations)


def default_threads() -> int:
    """QWEN_THREADS, else the physical cores this process may run on, within the CPU quota of its container.

    Raises KernelError if QWEN_THREADS is not an integer of 1 to 1024.
    """
    text = os.environ.get("QWEN_THREADS")
    if text:
        if not text.isdigit() or not 1 <= int(text) <= 1024:
            raise KernelError(f"QWEN_THREADS must be an integer of 1 to 1024, got {text!r}")
        return int(text)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return min(len(cores), _quota(Path("/sys/fs/cgroup/cpu.max")))


def _quota(path: Path) -> int:
    """Whole CPUs a cgroup grants, at least 1; ``path`` holds ``QUOTA PERIOD`` in microseconds or ``max PERIOD``."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return 1024
    return 1024 if quota == "max" else max(1, int(quota) // int(period))


def check_view(view: StepView, cache: CacheSpec) -> None:
    """Refuse a view that would read or write outside the cache (the kernels trust their indices)."""
    if not view.q_lens or min(view.q_lens) < 1 or min(view.starts) < 0:
        raise KernelError(f"a step needs runs of at least one token at positions >= 0, got {view.q_lens}")
    for length, table in zip(view.kv_lens(), view.block_tables, strict=True):
        used = table[: -(-int(length) // cache.block_size)]
        if len(used) * cache.block_size < length:
            raise KernelError(f"{length} tokens need more than {len(table)} blocks of {cache.block_size}")
        if min(used) < 0 or max(used) >= cache.num_blocks:
            raise KernelError(
                f"block ids must lie in 0..{cache.num_blocks - 1}, got {min(used)}..{max(used)}"
            )


def _format(fmt: str) -> tuple[str, type[np.generic]]:
    if fmt not in _FORMATS:
        raise KernelError(f"the cpu backend stores weights as {', '.join(_FORMATS)}, not {fmt!r}")
    return _FORMATS[fmt]
