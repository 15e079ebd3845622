"""Several low-rank adapters over one set of weights: which row has which, and the cells of plain operators for it.

The update of a row is its own adapter's only: y += (x A^T) B^T with the adapter's factor inside B. Without adapters
nothing of this is part of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from research.qwen.kernels.api import Kernels, StepView, Updates
from research.qwen.kernels.layer import Layer
from research.qwen.weights.adapters import LowRank

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")  # in the order of csrc/layer.h


def row_adapters(view: StepView) -> NDArray[np.int32] | None:
    """(T,) number of every token's adapter, -1 for none; None if no token has one."""
    if not view.adapters or max(view.adapters) < 0:
        return None
    return np.repeat(np.asarray(view.adapters, np.int32), view.q_lens)


def scaled(update: LowRank) -> NDArray[np.float32]:
    """B (n, r) with the factor inside, so that a kernel has two products only."""
    return np.ascontiguousarray(update.b * np.float32(update.scale))


class RankMask:
    """All adapters side by side: adapter i owns a run of columns of x A^T, as wide as its largest rank."""

    def __init__(self, adapters: Sequence[Updates]) -> None:
        self.widths = [max((one.rank for one in updates.values()), default=1) for updates in adapters]
        self.starts = np.cumsum([0, *self.widths])

    @property
    def total(self) -> int:
        """Columns of all adapters."""
        return int(self.starts[-1])

    def rows(self, view: StepView) -> NDArray[np.float32]:
        """(T, total): 1 in the columns of a row's own adapter, else 0."""
        numbers = row_adapters(view)
        mask = np.zeros((int(np.sum(view.q_lens)), self.total), np.float32)
        for number, width in enumerate(self.widths if numbers is not None else ()):
            start = self.starts[number]
            mask[numbers == number, start : start + width] = 1
        return mask

    def stacked(self, adapters: Sequence[Updates], name: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """A (total, k) and B (n, total) of all adapters at one matrix, zeros where one has less; None if none has."""
        found = [updates.get(name) for updates in adapters]
        shape = next(((one.b.shape[0], one.a.shape[1]) for one in found if one is not None), None)
        if shape is None:
            return None
        a, b = np.zeros((self.total, shape[1]), np.float32), np.zeros((shape[0], self.total), np.float32)
        for start, one in zip(self.starts, found, strict=False):
            if one is not None:
                a[start : start + one.rank], b[:, start : start + one.rank] = one.a, scaled(one)
        return a, b


class LowRankUpdate(nn.Cell):  # type: ignore[misc]
    """x (T, k), mask (T, R) -> (T, n): the update of every row by its own adapter."""

    def __init__(self, a: Tensor, b: Tensor, name: str) -> None:
        super().__init__(auto_prefix=False)
        self.a = Parameter(a, name=f"{name}.lora_A", requires_grad=False)
        self.b = Parameter(b, name=f"{name}.lora_B", requires_grad=False)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.matmul(self.matmul(x, self.a) * mask, self.b)


class AdaptedLayer(nn.Cell):  # type: ignore[misc]
    """A layer of plain cells with updates beside its matrices; the last tensor of ``step`` is the mask of RankMask."""

    def __init__(self, layer: Layer, updates: Mapping[str, LowRankUpdate]) -> None:
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.ln_1, self.ln_2 = layer.ln_1, layer.ln_2
        self.attn, self.mlp = layer.attn, layer.mlp
        self.qkv, self.out = updates.get("attn.c_attn"), updates.get("attn.c_proj")
        self.up, self.gate, self.down = (updates.get(f"mlp.{name}") for name in ("w1", "w2", "c_proj"))

    def construct(self, x: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        mask, step = step[-1], step[:-1]
        normed = self.ln_1(x)
        qkv = self.attn.c_attn(normed)
        if self.qkv is not None:
            qkv = qkv + self.qkv(normed, mask)
        mixed = self.attn.core(qkv, step)
        out = self.attn.c_proj(mixed)
        if self.out is not None:
            out = out + self.out(mixed, mask)
        x = x + out
        normed = self.ln_2(x)
        up, gate = self.mlp.w1(normed), self.mlp.w2(normed)
        if self.up is not None:
            up = up + self.up(normed, mask)
        if self.gate is not None:
            gate = gate + self.gate(normed, mask)
        product = self.mlp.swiglu(up, gate)
        down = self.mlp.c_proj(product)
        if self.down is not None:
            down = down + self.down(product, mask)
        return x + down


def adapted_layers(
    kernels: Kernels, layers: Sequence[Layer], adapters: Sequence[Updates], mask: RankMask
) -> list[AdaptedLayer]:
    """The layers with the updates of all adapters beside them, in the backend's number format."""
    out = []
    for number, layer in enumerate(layers):
        updates = {}
        for short in MATRICES:
            name = f"transformer.h.{number}.{short}"
            found = mask.stacked(adapters, name)
            if found is not None:
                a, b = (kernels.parameter(array, "float32") for array in found)
                updates[short] = LowRankUpdate(a, b, name)
        out.append(AdaptedLayer(layer, updates))
    return out
