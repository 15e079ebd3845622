"""Packed integer matrices and the fused layers of the cpu backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import KernelError
from research.qwen.kernels.api import CacheSpec, Updates
from research.qwen.kernels.cpu_lora import AdapterTable
from research.qwen.kernels.cpu_ops import F32, I32, I64, TYPES, numbered_operator, operator
from research.qwen.kernels.layer import Layer
from research.qwen.kernels.packing import Packing
from research.qwen.kernels.parameters import placeholder

COLUMNS = 16  # rows of a packed matrix come in groups of as many
_FLOAT_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_PACKED_CODE = 3
_CACHE_CODES = {"auto": 0, "float32": 0, "bfloat16": 1, "int8": 2}
_PLAN = 9  # numbers that describe one matrix: see MatrixPlan in csrc/ops_layer.cc


class PackedMatrix(nn.Cell):  # type: ignore[misc]
    """Parameters of a packed matrix (n, k), placeholders until they are loaded, and what the kernels must know."""

    def __init__(self, n: int, k: int, packed: Packing, bias: bool = False, wide: bool = False) -> None:
        super().__init__()
        scheme = packed.scheme
        self.n, self.k, self.packed, self.wide = n, k, packed, wide
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
        flags = [int(scheme.zeros), int(self.packed.ordered), int(self.wide), int(self.has_bias)]
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
        return self.parts()

    def parts(self) -> tuple[Tensor, ...]:
        """The parameters in the order of the kernels' inputs, loaded or not."""
        parts: tuple[Tensor, ...] = (self.weight, self.scales)
        if self.has_zeros:
            parts = (*parts, self.zeros)
        if self.has_order:
            parts = (*parts, self.order)
        if self.has_bias:
            parts = (*parts, self.bias)
        return parts


class PackedLinear(PackedMatrix):
    """x (T, k) -> x W^T + b (T, n) over a packed matrix; x in float32 (``exact``), 16 bits (``wide``) or 8."""

    def __init__(
        self, library: Path, k: int, n: int, bias: bool, packed: Packing, exact: bool, wide: bool
    ) -> None:
        super().__init__(n, k, packed, bias, wide)
        padded = -(-n // COLUMNS) * COLUMNS
        self.surplus = padded != n
        if bias and self.surplus:
            raise KernelError(f"a quantised matrix with bias needs a multiple of {COLUMNS} rows, got {n}")
        self.padded, self.exact = padded, exact
        self.plan_tensor = self._plan_tensor()
        self.kernel = numbered_operator(library, "QwenPacked", F32, I32, *self.types())

    def widen(self) -> None:
        """From now on x in 16 bits. Before the graph is compiled."""
        self.wide = True
        self.plan_tensor = self._plan_tensor()

    def _plan_tensor(self) -> Tensor:
        plan = [int(self.exact), *self.plan()]
        plan[-2] = self.padded
        return Tensor(np.array(plan, np.int32))

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


class FusedStack(nn.Cell):  # type: ignore[misc]
    """All layers as one operator. Their cells hold the parameters and the cache, whose addresses it is given.

    As inputs of the graph they would cost MindSpore 0.1 ms a layer and token (3 of 33 ms with the 1.8B model in int4).
    """

    def __init__(
        self, library: Path, config: QwenConfig, cache: CacheSpec, layers: list[Layer], exact: bool
    ) -> None:
        super().__init__()
        epsilon = int(np.float32(config.layer_norm_epsilon).view(np.int32))
        plan = [epsilon, int(exact), _CACHE_CODES[cache.fmt], config.num_heads, config.head_dim]
        plan += [cache.block_size, cache.num_blocks, len(layers)]
        parameters: list[Parameter] = []
        for layer in layers:
            matrices = _matrices(layer)
            plan += [number for matrix in matrices for number in matrix.plan()]
            names = [*layer.attn.core.caches(), layer.ln_1.weight, layer.ln_2.weight]
            parameters += names + [name for matrix in matrices for name in matrix.parts()]
        self.plan_tensor = Tensor(np.array(plan, np.int32))
        self._table = np.zeros(1 + len(parameters), np.int64)  # the first: adapters of this pass, or 0
        self.addresses = placeholder("addresses", 1, np.int64)  # a parameter: constants of a graph are copies
        self.addresses.set_data(Tensor.from_numpy(self._table), slice_shape=True)
        # A tuple, so that they do not become cells and parameters of ours.
        self._owners = (layers, parameters)
        self._adapters: AdapterTable | None = None
        self.kernel = operator(library, "QwenStack", F32, I32, I64, I32, F32, F32, F32, I32, I32, I32, I32)

    def adapt(self, adapters: Sequence[Updates]) -> None:
        """From now on a token may have one of these adapters, by its place."""
        self._adapters = AdapterTable(len(self._owners[0]), adapters)

    def refresh(self, of: NDArray[np.int32] | None = None) -> None:
        """Look the addresses up: a parameter may have been given other data. Before every run.

        ``of``: (T,) number of every token's adapter, -1 for none; None if no token has one. Raises ValueError for a
        weight that is not loaded, KernelError for an adapter that is not there.
        """
        layers, parameters = self._owners
        if not self._table[1:].any():
            for layer in layers:
                for matrix in _matrices(layer):
                    matrix.inputs()  # says which one is not loaded
        self._table[0] = self._adapters.address(of) if self._adapters is not None else 0
        self._table[1:] = [parameter.data_ptr() for parameter in parameters]

    def construct(self, x: Tensor, rows: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        """x (T, hidden) float32, rows (R,) int32, the tuple of ``make_step`` -> (R, hidden) float32 of these rows."""
        return self.kernel(x, self.plan_tensor, self.addresses, rows, *step)


def _matrices(layer: Layer) -> list[Any]:
    """In the order of csrc/ops_layer.cc."""
    return [layer.attn.c_attn, layer.attn.c_proj, layer.mlp.w1, layer.mlp.w2, layer.mlp.c_proj]


def float_plan(fmt: str, bias: bool, n: int, k: int) -> list[int]:
    """What csrc/ops_layer.cc reads of a matrix of plain numbers."""
    return [_FLOAT_CODES[fmt], 0, 0, 0, 0, 0, int(bias), n, k]
