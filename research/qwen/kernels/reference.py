"""The judge: every cell from plain mindspore.ops, in float32, slow and readable; other backends must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.kernels.api import ONE_GRAPH, CacheSpec, FormatOf, StepView, Updates
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.layer import Layer
from research.qwen.kernels.lora import RankMask, adapted_layers
from research.qwen.kernels.parameters import placeholder, zero_cache
from research.qwen.kernels.reference_kv import keeper
from research.qwen.quant.schemes import Scheme, dequantize_packed
from research.qwen.rope import logn_factors, rotary_tables


class ReferenceKernels:
    """Backend of plain operators; weights of any stored format are widened to float32 when they are set."""

    name = "reference"
    activation_dtype = "float32"
    ranks: RankMask | None = None  # once a model has adapters

    def linear(self, n_in: int, n_out: int, bias: bool, fmt: str) -> nn.Cell:
        """Cell x (T, n_in) -> x W^T + b (T, n_out)."""
        return Linear(bias)

    def embedding(self, rows: int, dim: int, fmt: str) -> nn.Cell:
        """Cell ids (T,) -> (T, dim)."""
        return Embedding()

    def rms_norm(self, dim: int, eps: float) -> nn.Cell:
        """Cell x -> x * rsqrt(mean(x^2) + eps) * weight."""
        return RMSNorm(eps)

    def swiglu(self) -> nn.Cell:
        """Cell (a, b) -> a * silu(b)."""
        return SwiGLU()

    def attention(self, config: QwenConfig, cache: CacheSpec) -> nn.Cell:
        """Cell (qkv (T, 3H), step) -> (T, H)."""
        return PagedAttention(config, cache)

    def layer(self, config: QwenConfig, cache: CacheSpec, prefix: str, fmt: FormatOf) -> nn.Cell:
        """Cell (x, step) -> (T, hidden) from the cells above."""
        return Layer(config, self, cache, prefix, fmt)

    def fuse(self, config: QwenConfig, cache: CacheSpec, layers: Sequence[nn.Cell]) -> None:
        """The layers run one by one."""
        return None

    def adapt(self, layers: Sequence[Layer], adapters: Sequence[Updates]) -> Sequence[nn.Cell]:
        """The layers with plain products beside their matrices."""
        self.ranks = RankMask(adapters)
        return adapted_layers(self, layers, adapters, self.ranks)

    def make_step(self, view: StepView, config: QwenConfig, cache: CacheSpec) -> tuple[Tensor, ...]:
        """Tables plus the maps between flattened tokens and rows padded to the longest run."""
        cos, sin = rotary_tables(view.starts, view.q_lens, view.alphas, config)
        positions = view.positions()
        slots = view.slot_mapping(cache.block_size)
        tables = view.padded_tables(cache.block_size)
        lengths = np.asarray(view.q_lens, np.int32)
        column = np.arange(lengths.max(), dtype=np.int32)[None, :]
        first = np.cumsum(lengths) - lengths
        inside = column < lengths[:, None]
        pad = (first[:, None] + np.where(inside, column, 0)).astype(np.int32)  # (B, Q) -> token of this row
        unpad = np.flatnonzero(inside.reshape(-1)).astype(np.int32)  # (T,) -> place in (B * Q)
        keys = np.arange(tables.shape[1] * cache.block_size, dtype=np.int32)
        arrays = (
            cos,
            sin,
            logn_factors(positions, config),
            np.stack([slots // cache.block_size, slots % cache.block_size], axis=1).astype(np.int32),
            tables,
            pad,
            unpad,
            positions[pad],
            keys,
            *((self.ranks.rows(view),) if self.ranks is not None else ()),
        )
        return tuple(Tensor.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def step_signature(
        self, config: QwenConfig, cache: CacheSpec, key: str = ONE_GRAPH
    ) -> tuple[Tensor, ...]:
        """Dynamic shapes of make_step's tuple."""
        half = config.head_dim // 2
        shapes: list[tuple[list[int | None], Any]] = [
            ([None, half], ms.float32),
            ([None, half], ms.float32),
            ([None], ms.float32),
            ([None, 2], ms.int32),
            ([None, None], ms.int32),
            ([None, None], ms.int32),
            ([None], ms.int32),
            ([None, None], ms.int32),
            ([None], ms.int32),
        ]
        if self.ranks is not None:
            shapes.append(([None, self.ranks.total], ms.float32))
        return tuple(Tensor(shape=shape, dtype=dtype) for shape, dtype in shapes)

    def graph_key(self, view: StepView) -> str:
        """One graph serves every view."""
        return ONE_GRAPH

    def quantised_parameters(
        self, arrays: Mapping[str, NDArray[Any]], scheme: str, n: int, k: int, table: bool = False
    ) -> dict[str, Tensor]:
        """The float32 matrix that the packed arrays stand for, columns in their true order."""
        return {"weight": Tensor.from_numpy(dequantize_packed(arrays, Scheme.parse(scheme), n, k))}

    def parameter(self, array: NDArray[Any], fmt: str) -> Tensor:
        """The array widened to float32 (no copy if it is float32 already)."""
        return Tensor.from_numpy(widen(array, fmt))


class Linear(nn.Cell):
    """y = x W^T + b."""

    def __init__(self, bias: bool):
        super().__init__()
        self.weight = placeholder("weight", 2)
        self.bias = placeholder("bias", 1) if bias else None
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Cell):
    """Rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = placeholder("weight", 2)

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


class RMSNorm(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) * weight, as in https://arxiv.org/abs/1910.07467."""

    def __init__(self, eps: float):
        super().__init__()
        self.weight = placeholder("weight", 1)
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt(self.mean(x * x, -1) + self.eps) * self.weight


class SwiGLU(nn.Cell):
    """a * silu(b) with silu(b) = b * sigmoid(b)."""

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return a * (b * ops.sigmoid(b))


class PagedAttention(nn.Cell):
    """Rotary, log-n, cache write, and causal softmax attention over each sequence's blocks.

    The cache is float32 and holds what its format keeps of the numbers.
    """

    def __init__(self, config: QwenConfig, cache: CacheSpec):
        super().__init__()
        self.heads, self.dim = config.num_heads, config.head_dim
        self.hidden = config.hidden_size
        self.scale = 1.0 / math.sqrt(self.dim)
        shape = (cache.num_blocks, cache.block_size, self.heads, self.dim)
        self.key_cache = zero_cache("key_cache", shape)
        self.value_cache = zero_cache("value_cache", shape)
        self.keep = keeper(cache.fmt)
        self.write = ops.ScatterNdUpdate()
        self.softmax = ops.Softmax(-1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding on halves: x (T, heads, d); cos, sin (T, 1, d / 2)."""
        a, b = ops.split(x, self.dim // 2, -1)
        return ops.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def read_cache(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values (slots, heads, head_dim) as float32."""
        keys, values = self.key_cache.asnumpy(), self.value_cache.asnumpy()
        return keys.reshape(-1, self.heads, self.dim), values.reshape(-1, self.heads, self.dim)

    def construct(self, qkv: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        cos, sin, logn, slots, tables, pad, unpad, positions, keys_at = step
        q, k, v = ops.split(qkv, self.hidden, 1)
        cos, sin = cos.expand_dims(1), sin.expand_dims(1)
        q = self.rotate(q.reshape((-1, self.heads, self.dim)), cos, sin) * logn.reshape((-1, 1, 1))
        k = self.rotate(k.reshape((-1, self.heads, self.dim)), cos, sin)
        key_cache = self.write(self.key_cache, slots, self.keep(k, pad, unpad))
        v = v.reshape((-1, self.heads, self.dim))
        value_cache = self.write(self.value_cache, slots, self.keep(v, pad, unpad))
        batch = tables.shape[0]
        keys = ops.gather(key_cache, tables, 0).reshape((batch, -1, self.heads, self.dim))  # (B, S, h, d)
        values = ops.gather(value_cache, tables, 0).reshape((batch, -1, self.heads, self.dim))
        queries = ops.gather(q, pad, 0)  # (B, Q, h, d)
        scores = ops.matmul(queries.transpose((0, 2, 1, 3)), keys.transpose((0, 2, 3, 1))) * self.scale
        visible = ops.less_equal(keys_at.reshape((1, 1, 1, -1)), positions.expand_dims(1).expand_dims(-1))
        scores = ops.select(visible.broadcast_to(scores.shape), scores, ops.full_like(scores, -1e30))
        mixed = ops.matmul(self.softmax(scores), values.transpose((0, 2, 1, 3)))  # (B, h, Q, d)
        flat = mixed.transpose((0, 2, 1, 3)).reshape((-1, self.hidden))
        return ops.gather(flat, unpad, 0)


def build() -> ReferenceKernels:
    """The reference backend; always available where MindSpore is."""
    return ReferenceKernels()
