"""Packed matrices for the tests of the integer kernels, and the kernels' arithmetic in NumPy."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.kernels.native import NativeLibrary
from research.qwen.quant import schemes
from research.qwen.quant.schemes import Codes, Scheme

# Every kind of scheme: bits, both groups and whole rows, with and without zero points.
STORED = (
    "int8",
    "int8-g64",
    "int8-g128",
    "int8-g128-asym",
    "int4",
    "int4-g64",
    "int4-asym",
    "int4-g64-asym",
)
WIDE = "x16"
SCHEMES = (*STORED, *(text + WIDE for text in STORED))
NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class Matrix:
    """Random codes (the full range, so that every bit of every product counts) and their packed arrays."""

    codes: Codes
    arrays: dict[str, NDArray[Any]]
    wide: bool = False  # it is multiplied with activations in 16 bits

    @property
    def scheme(self) -> Scheme:
        return self.codes.scheme

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.codes.shape
        return n, k

    @property
    def about(self) -> NDArray[np.int64]:
        return np.array([*self.shape, self.scheme.bits, self.scheme.group, self.wide], np.int64)

    def parts(self) -> list[NDArray[Any]]:
        return [self.arrays.get(name, NOTHING) for name in ("weight", "scales", "zeros")]

    def moved(self, move: Callable[[NDArray[Any]], NDArray[Any]]) -> Matrix:
        """The same with every array put elsewhere."""
        return Matrix(self.codes, {name: move(array) for name, array in self.arrays.items()}, self.wide)

    @property
    def order(self) -> NDArray[Any]:
        return self.arrays.get("order", NOTHING)


def matrix(rng: np.random.Generator, text: str, n: int, k: int, order: bool = False) -> Matrix:
    """``text``: a scheme, with "x16" behind it for activations in 16 bits."""
    scheme = Scheme.parse(text.removesuffix(WIDE))
    codes = rng.integers(0, scheme.top + 1, (n, k)).astype(np.uint8)
    codes[:, rng.integers(0, k)] = scheme.top
    groups = scheme.groups(k)
    scales = rng.uniform(0.5, 1.5, (n, groups)) / scheme.top * rng.choice([-1, 1], (n, groups))
    zeros = rng.integers(0, scheme.top + 1, (n, groups)).astype(np.uint8) if scheme.zeros else None
    made = Codes(codes, scales.astype(np.float16 if scheme.group else np.float32), zeros, scheme)
    arrays = schemes.pack(made, scheme, rng.permutation(k) if order else None)
    return Matrix(made, arrays, text.endswith(WIDE))


def activations(rng: np.random.Generator, rows: int, k: int) -> NDArray[np.float32]:
    """Rows of different sizes; some with a block of zeros."""
    x = rng.standard_normal((rows, k)) * rng.uniform(0.01, 100, (rows, 1))
    x[::3, :64] = 0
    return x.astype(np.float32)


def product(x: NDArray[np.float32], m: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The kernel's result, integers exact and the rest in float64: (rows, n), and the sum of magnitudes."""
    scheme, (n, k) = m.scheme, m.shape
    if len(m.order):
        x = x[:, m.order]
    q, scale, _ = schemes.quantize_activations(x, scheme.run(k, m.wide), m.wide)
    runs = scale.shape[1]
    levels = q[:, 0].astype(np.float64) if not m.wide else q[:, 0] * 256.0 + q[:, 1]
    centred = np.zeros((n, q.shape[2]), np.int64)
    zeros = m.codes.zeros if m.codes.zeros is not None else np.full((n, scheme.groups(k)), scheme.middle)
    along = np.repeat(zeros, scheme.block if scheme.group else k, axis=1)[:, :k].astype(np.int64)
    centred[:, :k] = m.codes.codes.astype(np.int64) - along
    dots = np.einsum(
        "tbi,nbi->tnb",
        levels.reshape(len(x), runs, -1),  # exact: all integers stay far below 2**53
        centred.reshape(n, runs, -1).astype(np.float64),
        optimize=True,
    )
    terms = dots * scale[:, None].astype(np.float64) * m.codes.scales[None].astype(np.float64)
    return terms.sum(2), np.abs(terms).sum(2)


def run(
    native: NativeLibrary,
    x: NDArray[np.float32],
    m: Matrix,
    bias: NDArray[np.float32] = NOTHING,
    residual: NDArray[np.float32] = NOTHING,
    name: str = "QwenTestQuantLinear",
) -> NDArray[np.float32]:
    y = np.full((len(x), m.shape[0]), np.nan, np.float32)
    assert native.bind(name, [x, *m.parts(), m.order, m.about, bias, residual], y)() == 0
    return y


def gated(native: NativeLibrary, x: NDArray[np.float32], a: Matrix, b: Matrix) -> NDArray[np.float32]:
    y = np.full((len(x), a.shape[0]), np.nan, np.float32)
    assert native.bind("QwenTestQuantGated", [x, *a.parts(), a.order, a.about, *b.parts()], y)() == 0
    return y


class EndOfPage:
    """Copies of arrays that end where memory ends: a read behind one kills the process."""

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        if not array.size:
            return array
        page = mmap.PAGESIZE
        length = -(-array.nbytes // page) * page
        region = mmap.mmap(-1, length + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + length), ctypes.c_size_t(page), 0) == 0
        self._kept.append(region)
        copy: NDArray[Any] = np.frombuffer(region, array.dtype, array.size, length - array.nbytes)
        copy = copy.reshape(array.shape)
        copy[...] = array
        return copy
