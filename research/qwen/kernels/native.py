"""The compiled kernels without MindSpore: the same entry points called through ctypes with NumPy arrays.

Used to set the number of threads, by the kernel tests and by the benchmark.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError

ISAS = ("amx", "vnni", "avx512", "avx2", "dot", "base")


class NativeLibrary:
    """A loaded kernel library. The instruction set is chosen at the first use: the best one, or QWEN_ISA."""

    def __init__(self, path: Path) -> None:
        """Raises KernelError if the file cannot be loaded or QWEN_ISA names what this processor lacks."""
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path} cannot be loaded: {error}; delete it and it is built again") from None
        self._library.QwenIsa.restype = ctypes.c_char_p
        self.isa: str = self._library.QwenIsa().decode()
        if not self.isa:
            raise KernelError(
                f"QWEN_ISA={os.environ.get('QWEN_ISA')} cannot be used on this processor; "
                f"choose one of {', '.join(ISAS)}, or leave it unset"
            )

    def set_threads(self, count: int) -> None:
        """Threads of every kernel, for the whole process."""
        self._library.QwenSetThreads(ctypes.c_int(count))

    @property
    def threads(self) -> int:
        """Threads in use; 1 until set_threads."""
        return int(self._library.QwenThreads())

    def read_memory(self, array: NDArray[np.float32]) -> None:
        """Reads the array once with all threads and does nothing else."""
        self._library.QwenReadMemory(ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.size))

    def bind(self, name: str, inputs: list[NDArray[Any]], output: NDArray[np.float32]) -> Callable[[], int]:
        """A function that runs one kernel on these arrays and returns its error code (0: done).

        The arrays must be contiguous and are kept alive by the function; their addresses may be unaligned.
        """
        arrays = [*inputs, output]
        count = len(arrays)
        shapes = [(ctypes.c_int64 * a.ndim)(*a.shape) for a in arrays]
        pointers = (ctypes.c_void_p * count)(*[a.ctypes.data for a in arrays])
        shape_pointers = (ctypes.c_void_p * count)(*[ctypes.addressof(s) for s in shapes])
        ranks = (ctypes.c_int * count)(*[a.ndim for a in arrays])
        function = getattr(self._library, name)

        def run(keep: Any = (arrays, shapes)) -> int:
            return int(function(ctypes.c_int(count), pointers, ranks, shape_pointers, None, None, None))

        return run
