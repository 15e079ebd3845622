"""Frozen matrices of a model in training: kept as they are stored, widened to float32 for the layer at work.

One buffer of each kind of matrix serves all layers, so beside the stored bits memory holds one layer in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from research.qwen.kernels.arrays import widen
from research.qwen.kernels.native_unpack import Unpacker, numpy_unpack
from research.qwen.kernels.packing import Packing
from research.qwen.quant.schemes import PANEL, dequantize_packed

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """A matrix (n, k) as stored: ``fmt`` float16 or bfloat16 with one array "weight", or packed arrays."""

    n: int
    k: int
    fmt: str
    packing: Packing | None
    arrays: Mapping[str, NDArray[Any]]

    def fill(self, out: Array, unpack: Unpacker) -> None:
        """Write the float32 values into ``out`` (n, k)."""
        if self.packing is not None:
            unpack(self.arrays, self.packing.scheme, out)
        elif self.fmt == "bfloat16":
            bits = out.view(np.uint32)
            np.copyto(bits, self.arrays["weight"])
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out, self.arrays["weight"])

    def wide(self) -> Array:
        """The float32 values, by NumPy."""
        out = np.empty((self.n, self.k), np.float32)
        self.fill(out, numpy_unpack)
        return out

    def rows(self, ids: NDArray[np.int32]) -> Array:
        """Rows (T,) of a table as float32 (T, k)."""
        if self.packing is None:
            return widen(self.arrays["weight"][ids], self.fmt)
        panels, within = np.unique(ids // PANEL, return_inverse=True)
        part = {
            name: array if name == "order" else np.ascontiguousarray(array[panels])
            for name, array in self.arrays.items()
        }
        wide = dequantize_packed(part, self.packing.scheme, len(panels) * PANEL, self.k)
        return np.ascontiguousarray(wide[within * PANEL + ids % PANEL])


class FrozenMatrices:
    """Matrices by published name, such as ``transformer.h.3.mlp.w1.weight``."""

    def __init__(self, unpack: Unpacker) -> None:
        self._unpack = unpack
        self._stored: dict[str, Stored] = {}
        self._buffers: dict[str, tuple[Array, Tensor]] = {}
        self._holds: dict[str, str] = {}  # kind of matrix -> whose values its buffer has

    def add(self, name: str, stored: Stored) -> None:
        """Take a matrix over."""
        self._stored[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Tensor:
        """The matrix in float32; valid until the same matrix of another layer is asked for."""
        kind = name.split(".", 3)[-1]
        stored = self._stored[name]
        if kind not in self._buffers:
            buffer = np.empty((stored.n, stored.k), np.float32)
            self._buffers[kind] = buffer, Tensor.from_numpy(buffer)
        buffer, tensor = self._buffers[kind]
        if self._holds.get(kind) != name:
            stored.fill(buffer, self._unpack)
            self._holds[kind] = name
        return tensor

    def rows(self, name: str, ids: NDArray[np.int32]) -> Array:
        """Rows (T,) of a table as float32."""
        return self._stored[name].rows(ids)

    def items(self) -> Iterator[tuple[str, Stored]]:
        """Names and matrices."""
        return iter(self._stored.items())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays and of the buffers in use."""
        stored = sum(array.nbytes for one in self._stored.values() for array in one.arrays.values())
        return stored + sum(buffer.nbytes for buffer, _ in self._buffers.values())
