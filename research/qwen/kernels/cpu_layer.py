"""Packed integer matrices and the fused layer of the cpu backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from research.qwen.config import QwenConfig
from research.qwen.errors import KernelError
from research.qwen.kernels.api import CacheSpec, FormatOf, Kernels
from research.qwen.kernels.cpu_ops import F32, I32, TYPES, numbered_operator
from research.qwen.kernels.layer import Layer
from research.qwen.kernels.packing import Packing
from research.qwen.kernels.parameters import placeholder

COLUMNS = 16  # rows of a packed matrix come in groups of as many
_FLOAT_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_PACKED_CODE = 3
_CACHE_CODES = {"auto": 0, "float32": 0, "bfloat16": 1, "int8": 2}
_PLAN = 8  # numbers that describe one matrix: see MatrixPlan in csrc/ops_layer.cc


class PackedMatrix(nn.Cell):  # type: ignore[misc]
    """Parameters of a packed matrix (n, k), placeholders until they are loaded, and what the kernels must know."""

    def __init__(self, n: int, k: int, packed: Packing, bias: bool = False) -> None:
        super().__init__()
        scheme = packed.scheme
        self.n, self.k, self.packed = n, k, packed
        self.weight = placeholder("weight", 4, np.uint8)
        self.scales = placeholder("scales", 3, np.float16 if scheme.group else np.float32)
        self.has_zeros, self.has_order, self.has_bias = scheme.zeros, packed.ordered, bias
        if scheme.zeros:
            self.zeros = placeholder("zeros", 3, np.uint8)
        if packed.ordered:
            self.order = placeholder("order", 1, np.int32)
        if bias:
            self.bias = placeholder("bias", 1)
        self.groups = -(-n // COLUMNS)

    def plan(self) -> list[int]:
        """What csrc/ops_layer.cc reads of this matrix."""
        scheme = self.packed.scheme
        flags = [int(scheme.zeros), int(self.packed.ordered), int(self.has_bias)]
        return [_PACKED_CODE, scheme.bits, scheme.group, *flags, self.n, self.k]

    def types(self) -> list[Any]:
        """Registration types of ``inputs``."""
        kinds: list[Any] = [np.uint8, np.float16 if self.packed.scheme.group else np.float32]
        kinds += [np.uint8] * self.has_zeros + [np.int32] * self.has_order + [np.float32] * self.has_bias
        return [TYPES[kind] for kind in kinds]

    def inputs(self) -> tuple[Tensor, ...]:
        """The parameters as inputs of an operator; ValueError at compilation if they are not loaded."""
        if self.weight.shape[0] != self.groups:
            raise ValueError(
                f"packed weight has shape {self.weight.shape}, expected {self.groups} groups of rows; load it first"
            )
        parts: tuple[Tensor, ...] = (self.weight, self.scales)
        if self.has_zeros:
            parts = (*parts, self.zeros)
        if self.has_order:
            parts = (*parts, self.order)
        if self.has_bias:
            parts = (*parts, self.bias)
        return parts


class PackedLinear(PackedMatrix):
    """x (T, k) -> x W^T + b (T, n) over a packed matrix."""

    def __init__(self, library: Path, k: int, n: int, bias: bool, packed: Packing, exact: bool) -> None:
        super().__init__(n, k, packed, bias)
        padded = -(-n // COLUMNS) * COLUMNS
        self.surplus = padded != n
        if bias and self.surplus:
            raise KernelError(f"a quantised matrix with bias needs a multiple of {COLUMNS} rows, got {n}")
        plan = [int(exact), *self.plan()]
        plan[-2] = padded
        self.plan_tensor = Tensor(np.array(plan, np.int32))
        self.kernel = numbered_operator(library, "QwenPacked", F32, I32, *self.types())

    def construct(self, x: Tensor) -> Tensor:
        """(T, k) float32 -> (T, n) float32."""
        y = self.kernel(x, self.plan_tensor, *self.inputs())
        return y[:, : self.n] if self.surplus else y


class PackedEmbedding(PackedMatrix):
    """ids (T,) int32 -> (T, k): rows of a packed table."""

    def __init__(self, library: Path, rows: int, dim: int, packed: Packing) -> None:
        super().__init__(rows, dim, packed)
        plan = np.zeros((1, max(dim, _PLAN)), np.int32)
        if plan.shape[1] != dim:
            raise KernelError(f"a quantised embedding needs rows of at least {_PLAN} numbers, got {dim}")
        plan[0, :_PLAN] = self.plan()
        self.plan_tensor = Tensor(plan)
        self.kernel = numbered_operator(library, "QwenPackedEmbedding", I32, I32, *self.types())

    def construct(self, ids: Tensor) -> Tensor:
        """(T,) int32 -> (T, dim) float32."""
        return self.kernel(ids, self.plan_tensor, *self.inputs())


class FusedLayer(Layer):
    """The whole layer as one operator; the cells of ``Layer`` hold its parameters and its cache."""

    def __init__(
        self,
        library: Path,
        config: QwenConfig,
        kernels: Kernels,
        cache: CacheSpec,
        prefix: str,
        fmt: FormatOf,
        exact: bool,
    ) -> None:
        super().__init__(config, kernels, cache, prefix, fmt)
        attn, mlp = self.attn, self.mlp
        matrices = (attn.c_attn, attn.c_proj, mlp.w1, mlp.w2, mlp.c_proj)
        epsilon = int(np.float32(config.layer_norm_epsilon).view(np.int32))
        plan = [
            epsilon,
            int(exact),
            _CACHE_CODES[cache.fmt],
            config.num_heads,
            config.head_dim,
            cache.block_size,
        ]
        for matrix in matrices:
            plan += matrix.plan()
        self.plan_tensor = Tensor(np.array(plan, np.int32))
        kinds = [F32, I32, F32, F32, F32, I32, I32, I32, I32, *attn.core.cache_types(), F32, F32]
        for matrix in matrices:
            kinds += matrix.types()
        self.kernel = numbered_operator(library, "QwenLayer", *kinds)

    def construct(self, x: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        """x (T, hidden) float32 and the tuple of ``make_step`` -> (T, hidden) float32."""
        attn, mlp = self.attn, self.mlp
        return self.kernel(
            x,
            self.plan_tensor,
            *step,
            *attn.core.caches(),
            self.ln_1.weight,
            self.ln_2.weight,
            *attn.c_attn.inputs(),
            *attn.c_proj.inputs(),
            *mlp.w1.inputs(),
            *mlp.w2.inputs(),
            *mlp.c_proj.inputs(),
        )


def float_plan(fmt: str, bias: bool, n: int, k: int) -> list[int]:
    """What csrc/ops_layer.cc reads of a matrix of plain numbers."""
    return [_FLOAT_CODES[fmt], 0, 0, 0, 0, int(bias), n, k]
