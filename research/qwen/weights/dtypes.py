"""Number formats of stored tensors, their names in each file format, and exact conversion between the three
floats.

NumPy has no bfloat16: such a tensor is an array of its uint16 bits, and the name "bfloat16" travels beside
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Format:
    """One number format: our name, safetensors' code, MindSpore's name in a .ckpt, and the NumPy type of the
    bits."""

    name: str
    safetensors: str
    mindspore: str
    numpy: np.dtype[Any]


FORMATS: tuple[Format, ...] = (
    Format("float32", "F32", "Float32", np.dtype("<f4")),
    Format("float16", "F16", "Float16", np.dtype("<f2")),
    Format("bfloat16", "BF16", "BFloat16", np.dtype("<u2")),
    Format("float64", "F64", "Float64", np.dtype("<f8")),
    Format("int8", "I8", "Int8", np.dtype("i1")),
    Format("uint8", "U8", "UInt8", np.dtype("u1")),
    Format("int16", "I16", "Int16", np.dtype("<i2")),
    Format("uint16", "U16", "UInt16", np.dtype("<u2")),
    Format("int32", "I32", "Int32", np.dtype("<i4")),
    Format("uint32", "U32", "UInt32", np.dtype("<u4")),
    Format("int64", "I64", "Int64", np.dtype("<i8")),
    Format("uint64", "U64", "UInt64", np.dtype("<u8")),
    Format("bool", "BOOL", "Bool", np.dtype("bool")),
)
BY_NAME = {item.name: item for item in FORMATS}
BY_SAFETENSORS = {item.safetensors: item for item in FORMATS}
BY_MINDSPORE = {item.mindspore: item for item in FORMATS}


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return BY_NAME[dtype].numpy.itemsize


def convert_block(block: NDArray[Any], source: str, target: str) -> tuple[NDArray[Any], int]:
    """Stored numbers of format ``source`` as ``target``, any shape; and how many finite ones became infinite.

    Widening is exact; narrowing rounds to nearest, ties to even, and keeps NaN and infinities.
    Raises CheckpointError for a format that is not one of FLOATS.
    """
    for dtype in (source, target):
        if dtype not in FLOATS:
            raise CheckpointError(f"cannot convert {source} to {target}; known: {', '.join(FLOATS)}")
    if source == target:
        return block, 0
    wide = bfloat16_to_float32(block) if source == "bfloat16" else block.astype(np.float32)
    if target == "float32":
        return wide, 0
    if target == "float16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = wide.astype(np.float16)
        return half, int(np.count_nonzero(np.isinf(half))) - int(np.count_nonzero(np.isinf(wide)))
    bits = float32_to_bfloat16(wide)
    infinite = int(np.count_nonzero((bits & 0x7FFF) == 0x7F80))
    return bits, infinite - int(np.count_nonzero(np.isinf(wide)))


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact float32 values of bfloat16 bits."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits nearest to float32 values, ties to even; NaN stays NaN, with its sign."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded += ((rounded & 1) + 0x7FFF + (bits & 0xFFFF)) >> 16
    nan = np.isnan(values)
    if nan.any():  # rounding could carry a NaN into infinity; set the quiet bit instead
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)
