"""Frozen quantised matrices in the Ascend step graph: packed on the device, widened where they are used, by plain
operators, in the forward and once more in the backward pass. Not run on an NPU by this project.

``WeightQuantBatchMatmul`` of inference has no backward pass, and nothing else on the device reads its type of int4; a
step has thousands of tokens, beside whose products the widening is small. So bytes are stored for plain operators: int8
levels as they are; of int4 the byte of inputs j and j + P / 2 is 16 * (level of the second) + code of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from research.qwen.kernels.packing import Packing
from research.qwen.quant.schemes import unpack


@dataclass(frozen=True)
class Base:
    """A matrix (n, k) of a quantised format as the graph keeps it."""

    packing: Packing
    n: int
    k: int

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.packing.scheme.groups(self.k)

    @property
    def width(self) -> int:
        """P: k, filled up to whole groups where there are several, and to whole bytes."""
        return self.groups * self.packing.scheme.group if self.groups > 1 else self.k + self.k % 2

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Parameters: name -> shape and dtype; those that a format has no use for have one number."""
        wide = self.width * self.packing.scheme.bits // 8
        return {
            "weight": ((self.n, wide), "int8"),
            "scales": ((self.n, self.groups, 1), "float32"),
            "offsets": ((self.n, self.groups, 1) if self.packing.scheme.zeros else (1, 1, 1), "float32"),
            "inverse": ((self.k if self.packing.ordered else 1,), "int32"),
        }

    def arrays(self, packed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The parameters' values out of the packed arrays of a checkpoint; CheckpointError if those are wrong."""
        scheme = self.packing.scheme
        plain = {name: array for name, array in packed.items() if name != "order"}
        codes = unpack(plain, scheme, self.n, self.k)
        full: NDArray[np.uint8] = np.full((self.n, self.width), scheme.middle, np.uint8)
        full[:, : self.k] = codes.codes
        if scheme.bits == 4:
            half = self.width // 2
            full = np.bitwise_or(full[:, :half], (full[:, half:] ^ 8) << 4, dtype=np.uint8)
        else:
            full ^= 0x80
        offsets = np.zeros((1, 1, 1), np.float32)
        if codes.zeros is not None:
            offsets = (np.float32(scheme.middle) - codes.zeros).astype(np.float32)[:, :, None]
        scales = codes.scales.astype(np.float32)[:, :, None]
        inverse = np.argsort(packed["order"]) if self.packing.ordered else np.zeros(1)
        return {
            "weight": full.view(np.int8),
            "scales": scales,
            "offsets": offsets,
            "inverse": inverse.astype(np.int32),
        }


class Widen(nn.Cell):
    """(weight, scales, offsets, inverse) -> the matrix (n, k) in the compute dtype."""

    def __init__(self, base: Base, kind: Any):
        super().__init__()
        self.kind, self.n, self.k, self.width, self.groups = kind, base.n, base.k, base.width, base.groups
        self.nibbles, self.zeros = base.packing.scheme.bits == 4, base.packing.scheme.zeros
        self.ordered = base.packing.ordered
        self.cast, self.floor, self.cat, self.gather = ops.Cast(), ops.Floor(), ops.Concat(1), ops.Gather()

    def construct(self, weight: Tensor, scales: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
        levels = self.cast(weight, ms.float32)
        if self.nibbles:
            high = self.floor(levels * 0.0625)
            levels = self.cat((levels - high * 16.0 - 8.0, high))
        levels = levels.reshape((self.n, self.groups, self.width // self.groups))
        if self.zeros:
            levels = levels + offsets
        wide = self.cast((levels * scales).reshape((self.n, self.width)), self.kind)
        if self.ordered:  # back from the stored order, and without what was filled up
            return self.gather(wide, inverse, 1)
        return wide if self.width == self.k else wide[:, : self.k]


class Product(nn.Cell):
    """(x (T, k), weight, scales, offsets, inverse) -> x W^T (T, n).

    MindSpore's recomputation makes W anew in the backward pass: kept in between it would cost what packing saves. It
    does so for the whole layer where that is computed again (``again``), else for this cell.
    """

    def __init__(self, base: Base, kind: Any, again: bool):
        super().__init__()
        self.widen = Widen(base, kind)
        self.matmul = ops.MatMul(transpose_b=True)
        if not again:
            self.recompute()

    def construct(
        self, x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor, inverse: Tensor
    ) -> Tensor:
        # What depends on parameters alone would not be computed again.
        return self.matmul(x, self.widen(ops.depend(weight, x), scales, offsets, inverse))
