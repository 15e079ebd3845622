"""Ascend backend: MindSpore's fused operators, in float16 (910A) or bfloat16 (910B).

Not run on an NPU by this project; docs/ascend.md says what is checked and how. Two graphs: ``prefill`` for
fresh prompts (FlashAttentionScore over the new keys) and ``paged`` for everything else (PagedAttention over
the cache). Their step tuples differ in length, which is static when a graph is compiled, so the length picks
the branch and no flag has to be kept in step with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, KernelError
from research.qwen.kernels.api import CacheSpec, FormatOf, StepView, Updates
from research.qwen.kernels.ascend_cells import DTYPES, Embedding, Linear, RMSNorm, SwiGLU, converted
from research.qwen.kernels.ascend_ops import FusedOps, mindspore_ops
from research.qwen.kernels.ascend_quant import (
    QuantLinear,
    check_operator,
    dequantised,
    operands,
    operator_for,
)
from research.qwen.kernels.devices import ascend_problem, ascend_soc
from research.qwen.kernels.layer import Layer
from research.qwen.kernels.lora import RankMask, adapted_layers
from research.qwen.kernels.packing import packing
from research.qwen.rope import logn_factors, rotary_tables

PREFILL, PAGED = "prefill", "paged"
SHARED_INPUTS = (
    6  # cos, sin, logn, positions, slots, lengths; the paged graph has tables, mask and q_lens as well
)
CACHE_DEFAULT = "auto"  # CacheSpec.fmt: each backend's own
MASKED = -10000.0  # what the attention kernels add to a forbidden score
TRIANGLE = 128  # side of the compressed causal mask of FlashAttentionScore in layout TH
HALVES = 2  # ApplyRotaryPosEmb cos_format: a row of cos and sin per token, element i pairs with i + d / 2
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_BLOCK_ELEMENTS = 128 * 128  # head_dim * block_size
FLAT_CACHE_SOCS = ("910a", "ascend910", "310p", "ascend310p")  # caches there are (blocks, block_size, H)


class AscendKernels:
    """Backend of fused operators; weights of any stored format become the compute dtype when they are set."""

    name = "ascend"
    ranks: RankMask | None = None  # once a model has adapters

    def __init__(self, dtype: str, fused: FusedOps, flat_cache: bool = False, soc: str = ""):
        self.activation_dtype = dtype
        self.fused, self.flat_cache, self.soc = fused, flat_cache, soc
        self._numpy = DTYPES[dtype]
        self._type = getattr(ms, dtype)
        self._causal = _triangle(dtype)

    def linear(self, n_in: int, n_out: int, bias: bool, fmt: str) -> nn.Cell:
        """Cell x (T, n_in) -> x W^T + b (T, n_out).

        KernelError for a quantised ``fmt`` on a chip whose operators do not take it. A quantised matrix beyond the
        operator's sizes (lm_head) is a plain one here: quantised_parameters dequantises it.
        """
        packed = packing(fmt)
        operator = operator_for(packed.scheme, n_out, n_in) if packed else None
        if packed is None or operator is None:
            return Linear(bias, self._type)
        check_operator(operator, self.soc)
        return QuantLinear(self.fused, operator, packed.ordered, bias, self._type)

    def embedding(self, rows: int, dim: int, fmt: str) -> nn.Cell:
        """Cell ids (T,) int32 -> (T, dim). The table of a quantised ``fmt`` is dequantised when it is loaded."""
        packing(fmt)  # refuses an unknown text
        return Embedding(self._type)

    def rms_norm(self, dim: int, eps: float) -> nn.Cell:
        """Cell x -> x * rsqrt(mean(x^2) + eps) * weight."""
        return RMSNorm(self.fused, eps, self._type)

    def swiglu(self) -> nn.Cell:
        """Cell (a, b) -> a * silu(b)."""
        return SwiGLU(self.fused)

    def attention(self, config: QwenConfig, cache: CacheSpec) -> nn.Cell:
        """Cell (qkv (T, 3H), step) -> (T, H). KernelError for sizes or cache formats the operators do not take."""
        check_shapes(config, cache)
        check_cache(cache, self.activation_dtype)
        shape: tuple[int, ...] = (cache.num_blocks, cache.block_size, config.num_heads, config.head_dim)
        if self.flat_cache:
            shape = (cache.num_blocks, cache.block_size, config.hidden_size)
        caches = [
            Tensor.from_numpy(np.zeros(shape, self._numpy)) for _ in range(2)
        ]  # pages are touched when used
        return PagedAttention(self.fused, config, caches, self._causal)

    def layer(self, config: QwenConfig, cache: CacheSpec, prefix: str, fmt: FormatOf) -> nn.Cell:
        """Cell (x, step) -> (T, hidden) from the cells above."""
        return Layer(config, self, cache, prefix, fmt)

    def fuse(self, config: QwenConfig, cache: CacheSpec, layers: Sequence[nn.Cell]) -> None:
        """The layers run one by one."""
        return None

    def adapt(self, layers: Sequence[Layer], adapters: Sequence[Updates]) -> Sequence[nn.Cell]:
        """The layers with plain products in the compute dtype beside their matrices."""
        self.ranks = RankMask(adapters)
        return adapted_layers(self, layers, adapters, self.ranks)

    def graph_key(self, view: StepView) -> str:
        """``prefill`` if every run starts its sequence, else ``paged``."""
        return PAGED if any(view.starts) else PREFILL

    def make_step(self, view: StepView, config: QwenConfig, cache: CacheSpec) -> tuple[Tensor, ...]:
        """Prefill: cos, sin (T, d), logn (T, 1), positions, slots (T,), lengths (B,).

        Paged: the same (lengths = tokens in the cache after this pass), then tables (B, M),
        mask (T, M * block_size) and q_lens (B,). With adapters the mask of RankMask is the last of either.
        """
        cos, sin = rotary_tables(view.starts, view.q_lens, view.alphas, config)
        positions = view.positions()
        arrays: list[NDArray[Any]] = [
            np.concatenate([cos, cos], axis=1).astype(self._numpy),
            np.concatenate([sin, sin], axis=1).astype(self._numpy),
            logn_factors(positions, config)[:, None].astype(self._numpy),
            positions,
            view.slot_mapping(cache.block_size),
            view.kv_lens().astype(np.int32),
        ]
        if self.graph_key(view) == PAGED:
            tables = view.padded_tables(cache.block_size)
            keys = np.arange(tables.shape[1] * cache.block_size, dtype=np.int32)
            hidden = keys[None, :] > positions[:, None]
            arrays += [
                tables,
                hidden.astype(self._numpy) * self._numpy(MASKED),
                np.asarray(view.q_lens, np.int32),
            ]
        if self.ranks is not None:
            arrays.append(self.ranks.rows(view).astype(self._numpy))
        return tuple(Tensor.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def step_signature(self, config: QwenConfig, cache: CacheSpec, key: str = PREFILL) -> tuple[Tensor, ...]:
        """Dynamic shapes of make_step's tuple for one of the two graphs."""
        shapes: list[tuple[list[int | None], Any]] = [
            ([None, config.head_dim], self._type),
            ([None, config.head_dim], self._type),
            ([None, 1], self._type),
            ([None], ms.int32),
            ([None], ms.int32),
            ([None], ms.int32),
        ]
        if key == PAGED:
            shapes += [([None, None], ms.int32), ([None, None], self._type), ([None], ms.int32)]
        if self.ranks is not None:
            shapes.append(([None, self.ranks.total], self._type))
        return tuple(Tensor(shape=shape, dtype=dtype) for shape, dtype in shapes)

    def parameter(self, array: NDArray[Any], fmt: str) -> Tensor:
        """The array in the compute dtype, without a copy if it is stored that way.

        Raises CheckpointError if a value does not fit float16.
        """
        if fmt == self.activation_dtype:
            stored = np.ascontiguousarray(array)
            return Tensor.from_numpy(stored.view(bfloat16) if fmt == "bfloat16" else stored)
        return Tensor.from_numpy(converted(array, fmt, self.activation_dtype))

    def quantised_parameters(
        self, arrays: Mapping[str, NDArray[Any]], scheme: str, n: int, k: int, table: bool = False
    ) -> dict[str, Tensor]:
        """Parameters of the cell of a quantised matrix (n, k), all but the bias, from its packed arrays.

        The operands of the matmul operator, or the weight in the compute dtype for an embedding (``table``) and for
        sizes the operator does not take. Raises CheckpointError if an array is wrong or a scale does not fit float16.
        """
        packed = packing(scheme)
        if packed is None:
            raise CheckpointError(f"{scheme} is not a quantised format")
        operator = None if table else operator_for(packed.scheme, n, k)
        if operator is None:
            weight = dequantised(arrays, packed.scheme, n, k, self.activation_dtype)
            return {"weight": Tensor.from_numpy(weight)}
        found = operands(arrays, operator, self.activation_dtype)
        tensors = {name: Tensor.from_numpy(array) for name, array in found.items()}
        if operator.scheme.bits == 4:
            tensors["weight"] = Tensor(found["weight"], getattr(ms, self.fused.packed_int4))
        return tensors


class PagedAttention(nn.Cell):
    """Rotary, log-n, cache write, and attention: over the new keys (prefill) or over the cache (paged)."""

    def __init__(self, fused: FusedOps, config: QwenConfig, caches: list[Tensor], causal: Tensor):
        super().__init__()
        self.heads, self.hidden = config.num_heads, config.hidden_size
        self.logn = config.use_logn_attn
        scale = 1.0 / math.sqrt(config.head_dim)
        self.key_cache = Parameter(caches[0], name="key_cache", requires_grad=False)
        self.value_cache = Parameter(caches[1], name="value_cache", requires_grad=False)
        self.causal = causal
        self.split = ops.Split(1, 3)
        self.rotate = fused.ApplyRotaryPosEmb(HALVES)
        self.write = fused.ReshapeAndCache()
        self.flash = fused.FlashAttentionScore(
            head_num=self.heads,
            scale_value=scale,
            pre_tokens=2147483647,
            next_tokens=0,
            inner_precise=0,
            input_layout="TH",
            sparse_mode=0,
        )
        self.paged = fused.PagedAttention(self.heads, scale, self.heads)

    def construct(self, qkv: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        cos, sin, logn, positions, slots, lengths = step[:SHARED_INPUTS]
        q, k, v = self.split(qkv)  # (T, H) each
        q, k = self.rotate(q, k, cos, sin, positions)
        if self.logn:
            q = q * logn
        written = self.write(k, v, self.key_cache, self.value_cache, slots)
        q = ops.depend(q, written)  # no read of the cache before the write
        if len(step) == SHARED_INPUTS:
            return self.flash(q, k, v, None, None, None, self.causal, None, lengths, lengths)[3]
        tables, mask, q_lens = step[SHARED_INPUTS:]
        return self.paged(q, self.key_cache, self.value_cache, tables, lengths, None, None, mask, q_lens)


def check_shapes(config: QwenConfig, cache: CacheSpec) -> None:
    """KernelError for sizes the fused operators do not take; every published Qwen has heads of 128."""
    dim, block = config.head_dim, cache.block_size
    if dim % 16 or not 16 <= dim <= MAX_HEAD_DIM:
        raise KernelError(
            f"backend ascend: head size {dim} (kv_channels) must be a multiple of 16 up to {MAX_HEAD_DIM}; "
            "use device cpu"
        )
    if block not in BLOCK_SIZES:
        raise KernelError(
            f"backend ascend: block_size {block} must be one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if dim * block > MAX_BLOCK_ELEMENTS:
        raise KernelError(
            f"backend ascend: block_size {block} times head size {dim} exceeds {MAX_BLOCK_ELEMENTS}; "
            "use a smaller block_size"
        )


def check_cache(cache: CacheSpec, dtype: str) -> None:
    """KernelError unless the cache is to be kept in the compute dtype."""
    if cache.fmt not in (CACHE_DEFAULT, dtype):
        raise KernelError(
            f"backend ascend keeps its KV cache in the compute dtype {dtype}, not in {cache.fmt}; leave the cache "
            "format at its default or use device cpu"
        )


def _triangle(dtype: str) -> Tensor:
    """(128, 128) causal mask of layout TH, added to the scores; bfloat16 has 1 = forbidden (MindFormers)."""
    forbidden = 1.0 if dtype == "bfloat16" else MASKED
    return Tensor(np.triu(np.full((TRIANGLE, TRIANGLE), forbidden, np.float32), 1), getattr(ms, dtype))


def build(
    dtype: str = "float16",
    device_id: int = 0,
    ops: FusedOps | None = None,
    require_device: bool = True,
    flat_cache: bool | None = None,
    soc: str | None = None,
) -> AscendKernels:
    """The Ascend backend.

    Args:
        dtype: of weights, activations and cache: float16 (910A and later) or bfloat16 (910B and later).
        device_id: which NPU.
        ops: other operators in place of MindSpore's (tests); float32 is allowed only with these.
        require_device: select the device; False builds cells that can be compiled but not run.
        flat_cache: caches of rank 3 instead of 4; None follows the chip (rank 3 on 910A and 310P).
        soc: name of the chip, in lower case; None asks MindSpore if a device is required.

    Raises KernelError if the dtype is unknown or MindSpore finds no Ascend device.
    """
    if dtype not in DTYPES or (dtype == "float32" and ops is None):
        raise KernelError(f"backend ascend computes in float16 or bfloat16, not {dtype!r}")
    if require_device:
        _select_device(device_id)
        soc = ascend_soc() if soc is None else soc
    soc = soc or ""
    if dtype == "bfloat16" and soc in FLAT_CACHE_SOCS:
        raise KernelError(f"{soc} has no bfloat16; use dtype float16")
    flat_cache = soc in FLAT_CACHE_SOCS if flat_cache is None else flat_cache
    return AscendKernels(dtype, ops or mindspore_ops(), flat_cache, soc)


def _select_device(device_id: int) -> None:
    """Make the NPU MindSpore's device, with the settings the fused attention kernels need."""
    problem = ascend_problem()
    if problem is not None:
        raise KernelError(
            f"backend ascend asked for, but MindSpore finds no Ascend device: {problem}; use device cpu"
        )
    try:
        ms.set_device("Ascend", device_id)
        ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelError(f"Ascend device {device_id} cannot be used: {lines[0]}") from error
