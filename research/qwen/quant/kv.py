"""The published int8 KV quantiser: one scale and zero point per row and head over a whole call, codes truncated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Quantised = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]


def quantize_cache(x: NDArray[np.float32]) -> Quantised:
    """Keys or values x (..., T, d) of one pass -> codes uint8 (..., T, d), scale and zero float32 (..., 1, 1).

    scale = (max - min) / 255 over T and d; zero = 0 - min / scale, not rounded; code = trunc(clip(x / scale + zero, 0,
    255)). The order of these float32 operations matters: a maximum may come out as 254. The published code leaves a
    constant x undefined (scale 0); here its codes are 0 and its zero point is such that dequantizing gives 0 * scale.
    """
    low, high = x.min(axis=(-2, -1), keepdims=True), x.max(axis=(-2, -1), keepdims=True)
    scale = (high - low) / np.float32(255)
    safe = np.where(scale > 0, scale, np.float32(1))
    zero = np.float32(0) - low / safe
    codes = np.clip(x / safe + zero, np.float32(0), np.float32(255)).astype(np.uint8)
    return codes, scale, zero


def dequantize_cache(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], zero: NDArray[np.float32]
) -> NDArray[np.float32]:
    """scale * (code - zero), the shapes of quantize_cache."""
    wide: NDArray[np.float32] = scale * (codes.astype(np.float32) - zero)
    return wide
