"""Paged attention cases for the kernels, with the cache as the kernels lay it out; its formats as NumPy models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from research.qwen.kernels.kv_layout import SUFFIX, cache_arrays, read_cache
from tests.kernels import cpu_truth as truth

FORMATS = tuple(SUFFIX)
Cache = dict[str, np.ndarray]


def empty_cache(blocks: int, block_size: int, heads: int, d: int, fmt: str = "float32") -> Cache:
    """Caches full of NaN (int8: of -128 with NaN as scale), so that using a slot nobody wrote shows."""
    filling = {np.float32: np.nan, np.uint16: 0x7FC0, np.int8: -128}
    return {
        name: np.full(shape, filling[dtype], dtype)
        for name, (shape, dtype) in cache_arrays(fmt, blocks, block_size, heads, d).items()
    }


def format_of(cache: Cache) -> str:
    return {np.float32: "float32", np.uint16: "bfloat16", np.int8: "int8"}[cache["key_cache"].dtype.type]


def sequence(rng: np.random.Generator, length: int, heads: int, d: int) -> dict[str, np.ndarray]:
    """qkv, rotary tables and log-n factors of one whole sequence."""
    angle = np.arange(length)[:, None] / 100.0 ** (np.arange(0, d, 2) / d)
    return {
        "qkv": rng.standard_normal((length, 3 * heads * d)).astype(np.float32),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "logn": np.linspace(1, 1.3, length, dtype=np.float32),
    }


@dataclass(frozen=True)
class Paged:
    """Inputs of one call of the attention kernel, in its order, and what it works on."""

    arrays: dict[str, np.ndarray]  # qkv, cos, sin, logn, slots, tables, q_lens, kv_lens
    cache: Cache

    @property
    def slots(self) -> np.ndarray:
        return self.arrays["slots"]

    def run(self, native) -> tuple[int, np.ndarray]:
        """The kernel's error code and (T, heads * d), which is NaN where nothing was written."""
        qkv = self.arrays["qkv"]
        y = np.full((len(qkv), qkv.shape[1] // 3), np.nan, np.float32)
        name = f"QwenAttention{SUFFIX[format_of(self.cache)]}"
        return native.bind(name, [*self.arrays.values(), *self.cache.values()], y)(), y

    def changed(self, **arrays: object) -> Paged:
        """The same call with some int32 arrays replaced."""
        new = {name: np.asarray(value, np.int32) for name, value in arrays.items()}
        return replace(self, arrays={**self.arrays, **new})


def step(runs: list[tuple[dict, int, int, list[int]]], cache: Cache) -> Paged:
    """One call: each run is (sequence, start, length, blocks)."""
    block_size = cache["value_cache"].shape[2]
    width = max(len(blocks) for *_, blocks in runs)
    tables = np.zeros((len(runs), width), np.int32)
    slots = []
    for row, (_, start, length, blocks) in enumerate(runs):
        tables[row, : len(blocks)] = blocks
        position = np.arange(start, start + length)
        slots.append(np.asarray(blocks)[position // block_size] * block_size + position % block_size)
    arrays = {
        name: np.concatenate([s[name][start : start + length] for s, start, length, _ in runs])
        for name in ("qkv", "cos", "sin", "logn")
    }
    arrays["slots"] = np.concatenate(slots).astype(np.int32)
    arrays["tables"] = tables
    arrays["q_lens"] = np.array([length for _, _, length, _ in runs], np.int32)
    arrays["kv_lens"] = np.array([start + length for _, start, length, _ in runs], np.int32)
    return Paged(arrays, cache)


def cached(call: Paged) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (T, heads, d) of a call's own tokens as the cache has them, float32."""
    keys, values = read_cache(call.cache)
    return keys[call.slots], values[call.slots]


def rotated_keys(case: dict[str, np.ndarray], heads: int, d: int) -> np.ndarray:
    """(T, heads, d) float32 keys after rotation, with the same roundings as the kernels."""
    k = case["qkv"][:, heads * d : 2 * heads * d].reshape(-1, heads, d)
    a, b = np.split(k, 2, axis=-1)
    cos, sin = case["cos"][:, None], case["sin"][:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def stored(x: np.ndarray, fmt: str) -> np.ndarray:
    """What a format keeps of float32 numbers (..., d): the NumPy model of the cache."""
    if fmt == "float32":
        return x
    if fmt == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
    codes, scale = int8_codes(x)
    return codes.astype(np.float32) * scale


def int8_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (..., d) and scales float32 (..., 1): scale = max|x| / 127, rounded to nearest even."""
    most = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most >= 1e-30)
    return np.rint(x * inverse).astype(np.int8), np.where(
        most >= 1e-30, most / np.float32(127), np.float32(0)
    )


def expected(case: dict[str, np.ndarray], heads: int, d: int, fmt: str) -> np.ndarray:
    """Attention of one whole sequence in float64 on what the cache keeps: (T, heads * d)."""
    keys = stored(rotated_keys(case, heads, d), fmt)
    values = stored(case["qkv"][:, 2 * heads * d :].reshape(-1, heads, d), fmt)
    return truth.attend(case, keys, values)
