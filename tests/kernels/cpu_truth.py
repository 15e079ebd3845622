"""The kernels' mathematics in NumPy float64."""

from __future__ import annotations

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


def attention(s: dict[str, np.ndarray], heads: int, d: int) -> np.ndarray:
    """Causal attention of one whole sequence in float64: (length, heads * d)."""
    s = {name: value.astype(np.float64) for name, value in s.items()}
    _, k, v = (part.reshape(-1, heads, d) for part in np.split(s["qkv"], 3, axis=1))
    return attend(s, rotate(k, s), v)


def rotate(x: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    """Rotary embedding on halves: (length, heads, d)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = s["cos"][:, None], s["sin"][:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(s: dict[str, np.ndarray], keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same on given rotated keys and values (length, heads, d), with a plain mask and softmax."""
    length, heads, d = keys.shape
    s = {name: value.astype(np.float64) for name, value in s.items()}
    q = rotate(s["qkv"][:, : heads * d].reshape(length, heads, d), s) * s["logn"][:, None, None]
    scores = np.einsum("qhd,khd->hqk", q, keys.astype(np.float64)) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, values.astype(np.float64)).reshape(length, heads * d)
