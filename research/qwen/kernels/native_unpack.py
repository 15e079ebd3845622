"""Packed integer matrices back to float32 with the C++ kernels, into memory that is given. Imports no MindSpore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError
from research.qwen.kernels.build import library_path
from research.qwen.kernels.native import NativeLibrary
from research.qwen.quant.schemes import Scheme, dequantize_packed


class Unpacker(Protocol):
    """Writes the float32 matrix that packed arrays (quant.schemes) stand for into ``out`` (n, k)."""

    def __call__(
        self, arrays: Mapping[str, NDArray[Any]], scheme: Scheme, out: NDArray[np.float32]
    ) -> None: ...


def numpy_unpack(arrays: Mapping[str, NDArray[Any]], scheme: Scheme, out: NDArray[np.float32]) -> None:
    """The Unpacker in NumPy, with the same bits."""
    np.copyto(out, dequantize_packed(arrays, scheme, *out.shape))


class NativeUnpacker:
    """The Unpacker on all threads of the kernels."""

    def __init__(self, library: NativeLibrary | None = None) -> None:
        """Raises KernelError if the kernels cannot be built or loaded here."""
        self._library = library or NativeLibrary(library_path())

    def __call__(self, arrays: Mapping[str, NDArray[Any]], scheme: Scheme, out: NDArray[np.float32]) -> None:
        """KernelError if the arrays do not fit."""
        about = np.array([*out.shape, scheme.bits, scheme.group, 0], np.int64)
        nothing = np.empty(0, np.uint8)
        parts = [
            arrays["weight"],
            arrays["scales"],
            arrays.get("zeros", nothing),
            arrays.get("order", nothing),
        ]
        if not out.flags.c_contiguous:
            raise KernelError("a matrix is unpacked into contiguous memory only")
        code = self._library.bind(
            "QwenUnpack", [np.ascontiguousarray(part) for part in parts] + [about], out
        )()
        if code:
            raise KernelError(f"unpacking a matrix {out.shape} of {scheme} failed with code {code}")


def unpacker(backend: str) -> Unpacker:
    """The C++ one; NumPy's where the kernels cannot be built and ``backend`` does not need them. KernelError if so."""
    try:
        return NativeUnpacker()
    except KernelError:
        if backend == "cpu":
            raise
        return numpy_unpack
