"""How the cpu kernels lay the paged KV cache out in memory, as csrc/attention.h says. NumPy only.

One head's tokens of a block lie together. Keys are (blocks, heads, block_size / L, d, L): L tokens side by side for
each dimension, L the largest power of two up to 16 that divides block_size. Values are (blocks, heads, block_size, d).
int8 numbers have one float32 scale per token and head: ``key_scales``, ``value_scales`` (blocks, heads, block_size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError
from research.qwen.kernels.arrays import widen

STORED: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
SUFFIX = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}  # of the kernels' names
Floats = NDArray[np.float32]


def cache_arrays(
    fmt: str, blocks: int, block_size: int, heads: int, d: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Parameter name -> (shape, dtype) in the order the kernels take them; KernelError for an unknown format."""
    if fmt not in STORED:
        raise KernelError(f"the cpu backend keeps keys and values as {', '.join(STORED)}, not {fmt!r}")
    lanes = math.gcd(block_size, 16)
    found: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "key_cache": ((blocks, heads, block_size // lanes, d, lanes), STORED[fmt]),
        "value_cache": ((blocks, heads, block_size, d), STORED[fmt]),
    }
    if fmt == "int8":
        found |= {name: ((blocks, heads, block_size), np.float32) for name in ("key_scales", "value_scales")}
    return found


def read_cache(arrays: Mapping[str, NDArray[Any]]) -> tuple[Floats, Floats]:
    """Keys and values (blocks * block_size, heads, d) as float32, in the order of the slots."""
    keys, values = arrays["key_cache"], arrays["value_cache"]
    keys = keys.swapaxes(-1, -2).reshape(values.shape)
    return _by_slot(keys, arrays.get("key_scales")), _by_slot(values, arrays.get("value_scales"))


def _by_slot(stored: NDArray[Any], scales: Floats | None) -> Floats:
    """(blocks, heads, block_size, d) -> (tokens, heads, d)."""
    blocks, heads, block_size, d = stored.shape
    wide = widen(stored, "bfloat16") if stored.dtype == np.uint16 else stored.astype(np.float32)
    if scales is not None:
        wide = wide * scales[..., None]
    return np.ascontiguousarray(wide.swapaxes(1, 2)).reshape(blocks * block_size, heads, d)
