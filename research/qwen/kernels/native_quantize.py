"""The C++ quantiser: the same bits as quant.schemes.quantize_rows, at the speed of memory. Imports no MindSpore."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError, KernelError
from research.qwen.kernels.build import library_path
from research.qwen.kernels.native import NativeLibrary
from research.qwen.quant.schemes import PANEL, Arrays, Scheme

_FORMATS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}
_NOT_FINITE, _TOO_LARGE = 1, 2


class NativeQuantiser:
    """A ``quant.schemes.Quantiser`` on all threads of the kernels."""

    def __init__(self, threads: int | None = None, library: Path | None = None) -> None:
        """``threads``: of the whole process from the first use on; None leaves them as they are.

        Raises KernelError if the kernels cannot be built or loaded here.
        """
        path = library or library_path()
        self._native = NativeLibrary(path)  # refuses an instruction set that this processor lacks
        self._threads = threads
        self._function = ctypes.CDLL(str(path)).QwenQuantise
        number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [
            pointer,
            number,
            size,
            size,
            number,
            size,
            number,
            pointer,
            pointer,
            pointer,
        ]

    def __call__(self, rows: NDArray[Any], scheme: Scheme, arrays: Arrays, first: int) -> None:
        """Fill packed arrays from row ``first`` (a multiple of 16) on; CheckpointError as quant.schemes.quantize."""
        if self._threads is not None and self._native.threads != self._threads:
            self._native.set_threads(self._threads)
        rows = np.ascontiguousarray(rows)
        panels = -(-len(rows) // PANEL)
        start = first // PANEL
        parts = {name: array[start : start + panels] for name, array in arrays.items()}
        if first % PANEL or any(
            len(part) != panels or not part.flags.c_contiguous for part in parts.values()
        ):
            raise KernelError(f"rows {first} to {first + len(rows)} do not fit the packed arrays")
        zeros = parts["zeros"].ctypes.data if scheme.zeros else None
        faults = self._function(
            rows.ctypes.data,
            _FORMATS[rows.dtype],
            *rows.shape,
            scheme.bits,
            scheme.group,
            int(scheme.zeros),
            parts["weight"].ctypes.data,
            parts["scales"].ctypes.data,
            zeros,
        )
        if faults & _NOT_FINITE:
            raise CheckpointError("a weight is not a finite number; it cannot be quantised")
        if faults & _TOO_LARGE:
            raise CheckpointError(
                "weights are too large for scales in float16; use int8, which has float32 scales"
            )
