"""Rotary tables, dynamic NTK and log-n factors, in NumPy: data for every backend.

Formulas as the published model computes them: angles in float32, halves layout (i pairs with i + d/2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig


def ntk_alpha(length: int, config: QwenConfig) -> float:
    """NTK factor for a prompt of ``length`` tokens: 1 up to seq_length, 3 up to twice that, then 7, 15, ...

    alpha = max(2^ceil(log2(length / seq_length) + 1) - 1, 1); chosen at the prefill of a sequence and then
    kept, since the cached keys are already rotated with it.
    """
    if not config.use_dynamic_ntk or length <= config.seq_length:
        return 1.0
    return max(2.0 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1, 1.0)


@lru_cache(maxsize=16)
def inverse_frequencies(head_dim: int, base: float, alpha: float) -> NDArray[np.float32]:
    """(head_dim / 2,) float32: 1 / b^(2i/d) with b = base * alpha^(d / (d - 2))."""
    if alpha != 1.0:
        base = base * alpha ** (head_dim / (head_dim - 2))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1.0) / np.power(np.float32(base), exponents)).astype(np.float32)


def rotary_tables(
    starts: Sequence[int], lengths: Sequence[int], alphas: Sequence[float], config: QwenConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin for runs of consecutive tokens, each (sum of lengths, head_dim / 2) float32."""
    angles = [
        np.arange(start, start + length, dtype=np.float32)[:, None]
        * inverse_frequencies(config.head_dim, config.rotary_emb_base, float(alpha))[None, :]
        for start, length, alpha in zip(starts, lengths, alphas, strict=True)
    ]
    table = np.concatenate(angles) if angles else np.zeros((0, config.head_dim // 2), np.float32)
    return np.cos(table), np.sin(table)


def logn_factors(positions: NDArray[np.int32], config: QwenConfig) -> NDArray[np.float32]:
    """(T,) float32 factor of the query at 0-based position p: log(p + 1) / log(seq_length) beyond it, else 1.

    A query beyond seq_length always sees more than seq_length keys, so the position alone decides.
    """
    if not config.use_logn_attn:
        return np.ones(len(positions), np.float32)
    scaled = np.log(positions.astype(np.float64) + 1.0) / math.log(config.seq_length)
    factors: NDArray[np.float32] = np.maximum(scaled, 1.0).astype(np.float32)
    return factors
