"""Adapters as csrc/ops_layer.cc reads them: addresses of their matrices, and which token of a pass has which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError
from research.qwen.kernels.api import Updates
from research.qwen.kernels.lora import MATRICES, scaled
from research.qwen.weights.adapters import LowRank

_HEAD, _ENTRY = 3, 3  # numbers of struct Adapted before its weights, and of struct LowRank
_LANES = 16  # of the widest vectors: products of parts of one take several times as long


class AdapterTable:
    """struct Adapted of csrc/ops_layer.cc in int64: address of ``of``, tokens, adapters, then (layers, 5, adapters) of
    (address of A, address of B, rank). Keeps the arrays alive."""

    def __init__(self, layers: int, adapters: Sequence[Updates]) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._of = np.zeros(0, np.int32)
        self._numbers = np.zeros(_HEAD + layers * len(MATRICES) * len(adapters) * _ENTRY, np.int64)
        self._numbers[2] = self._count = len(adapters)
        entries = self._numbers[_HEAD:].reshape(layers, len(MATRICES), len(adapters), _ENTRY)
        for layer in range(layers):
            for place, short in enumerate(MATRICES):
                for number, updates in enumerate(adapters):
                    one = updates.get(f"transformer.h.{layer}.{short}")
                    if one is not None:
                        a, b = _padded(one)
                        self._kept += [a, b]
                        entries[layer, place, number] = a.ctypes.data, b.ctypes.data, len(a)

    def address(self, of: NDArray[np.int32] | None) -> int:
        """Address of the struct for a pass over tokens with these adapters (``lora.row_adapters``), 0 for None.

        Valid until the next call. KernelError for a number that is no adapter's.
        """
        if of is None:
            return 0
        if int(of.max()) >= self._count:
            raise KernelError(f"there is no adapter {int(of.max())}, only {self._count}")
        self._of = np.ascontiguousarray(of, np.int32)
        self._numbers[:2] = self._of.ctypes.data, self._of.size
        return int(self._numbers.ctypes.data)


def _padded(update: LowRank) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A (R, k) and B (n, R), the rank filled up with zeros to whole vectors."""
    rank = -(-update.rank // _LANES) * _LANES
    a = np.zeros((rank, update.a.shape[1]), np.float32)
    b = np.zeros((update.b.shape[0], rank), np.float32)
    a[: update.rank], b[:, : update.rank] = update.a, scaled(update)
    return a, b
