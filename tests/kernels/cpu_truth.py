"""The kernels' mathematics in NumPy float64, and paged attention cases to feed them with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from research.qwen.kernels.arrays import widen

FORMATS = ("float32", "bfloat16", "float16")
SUFFIX = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def stored(values: np.ndarray, fmt: str) -> np.ndarray:
    """Values cut to a storage format (bfloat16 as uint16 bits, truncated)."""
    if fmt == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(fmt)


def linear(x: np.ndarray, w: np.ndarray, fmt: str, bias: np.ndarray | None = None) -> np.ndarray:
    y = x.astype(np.float64) @ widen(w, fmt).astype(np.float64).T
    return y if bias is None else y + bias


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def swiglu(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = b.astype(np.float64)
    return a * (b * np.exp(-np.logaddexp(0, -b)))


@dataclass(frozen=True)
class Paged:
    """Input arrays of the attention kernel, in its order."""

    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    logn: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    q_lens: np.ndarray
    kv_lens: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def inputs(self) -> list[np.ndarray]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def output(self) -> np.ndarray:
        return np.zeros((len(self.qkv), self.qkv.shape[1] // 3), np.float32)


def sequence(rng: np.random.Generator, length: int, heads: int, d: int) -> dict[str, np.ndarray]:
    """qkv, rotary tables and log-n factors of one whole sequence."""
    angle = np.arange(length)[:, None] / 100.0 ** (np.arange(0, d, 2) / d)
    return {
        "qkv": rng.standard_normal((length, 3 * heads * d)).astype(np.float32),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "logn": np.linspace(1, 1.3, length, dtype=np.float32),
    }


def empty_cache(blocks: int, block_size: int, heads: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Caches full of NaN, so that reading a slot nobody wrote shows."""
    shape = (blocks, block_size, heads, d)
    return np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)


def step(runs: list[tuple[dict, int, int, list[int]]], cache: tuple[np.ndarray, np.ndarray]) -> Paged:
    """One call: each run is (sequence, start, length, blocks)."""
    block_size = cache[0].shape[1]
    width = max(len(blocks) for *_, blocks in runs)
    tables = np.zeros((len(runs), width), np.int32)
    slots = []
    for row, (_, start, length, blocks) in enumerate(runs):
        tables[row, : len(blocks)] = blocks
        position = np.arange(start, start + length)
        slots.append(np.asarray(blocks)[position // block_size] * block_size + position % block_size)
    parts = {
        name: np.concatenate([s[name][start : start + length] for s, start, length, _ in runs])
        for name in ("qkv", "cos", "sin", "logn")
    }
    return Paged(
        **parts,
        slots=np.concatenate(slots).astype(np.int32),
        tables=tables,
        q_lens=np.array([length for _, _, length, _ in runs], np.int32),
        kv_lens=np.array([start + length for _, start, length, _ in runs], np.int32),
        keys=cache[0],
        values=cache[1],
    )


def attention(s: dict[str, np.ndarray], heads: int, d: int) -> np.ndarray:
    """Causal attention of one whole sequence with a plain mask and softmax, float64: (length, heads * d)."""
    s = {name: value.astype(np.float64) for name, value in s.items()}
    length = len(s["qkv"])
    q, k, v = (part.reshape(length, heads, d) for part in np.split(s["qkv"], 3, axis=1))
    cos, sin = s["cos"][:, None], s["sin"][:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    scores = np.einsum("qhd,khd->hqk", rotate(q) * s["logn"][:, None, None], rotate(k)) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(length, heads * d)


def with_slots(paged: Paged, slots: list[int]) -> Paged:
    """The same call with other slots."""
    return replace(paged, slots=np.array(slots, np.int32))
