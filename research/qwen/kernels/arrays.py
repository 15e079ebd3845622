"""Stored number formats as NumPy arrays: bfloat16 travels as its uint16 bits, since NumPy has no such type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import bfloat16_to_float32

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def widen(array: NDArray[Any], fmt: str) -> NDArray[np.float32]:
    """float32 values of an array stored as ``fmt``; exact, and no copy if it is float32 already."""
    if fmt not in STORED:
        raise CheckpointError(f"weights of format {fmt!r} cannot be widened; known: {', '.join(STORED)}")
    if fmt == "bfloat16":
        return bfloat16_to_float32(array)
    return np.ascontiguousarray(array, np.float32)
