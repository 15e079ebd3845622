"""Integer weight formats: the NumPy truth that every kernel is compared with.

A matrix W (N outputs, K inputs) is stored as unsigned codes with one scale per output row, or per row and group of
consecutive inputs: ``W[n, k] = scale[n, g(k)] * (code[n, k] - zero[n, g(k)])``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.quant.rounding import round_groups, round_rows

PANEL = 16  # output rows that are packed side by side
ROW_BLOCK = 128  # the same where weights have one scale per row
GROUPS = (64, 128)
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Scheme:
    """``bits`` 4 or 8; ``group`` inputs share a scale (0: the whole row, int8 only); ``zeros``: own zero points.

    Text form ``int{bits}[-g{group}][-asym]``: "int8" has one scale per row, "int4" groups of 128. Raises ConfigError.
    """

    bits: int
    group: int
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"integer weights have 4 or 8 bits, got {self.bits}")
        if self.group not in GROUPS and (self.group != 0 or self.bits != 8 or self.zeros):
            raise ConfigError(
                f"groups of int{self.bits} weights{' with zero points' if self.zeros else ''} have "
                f"{' or '.join(map(str, GROUPS))} inputs, got {self.group}"
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme of a text such as "int4-g64-asym"; ConfigError if it is none."""
        found = re.fullmatch(r"int([48])(?:-g(\d{1,6}))?(-asym)?", text)
        if found is None:
            raise ConfigError(
                f"unknown integer format {text!r}: write int8, int4, int4-g64, int4-asym, int8-g128, ..."
            )
        bits, zeros = int(found[1]), found[3] is not None
        default = 128 if bits == 4 or zeros else 0
        return cls(bits, int(found[2]) if found[2] else default, zeros)

    def __str__(self) -> str:
        default = 128 if self.bits == 4 or self.zeros else 0
        group = "" if self.group == default else f"-g{self.group}"
        return f"int{self.bits}{group}{'-asym' if self.zeros else ''}"

    @property
    def block(self) -> int:
        """K is padded to a multiple of it; activations in 8 bits have one scale for as many inputs."""
        return self.group or ROW_BLOCK

    def run(self, k: int, wide: bool) -> int:
        """Inputs of a row of ``k`` activations that share a scale; with 16 bits (``wide``) a row needs only one."""
        return self.padded(PANEL, k)[1] if wide and not self.group else self.block

    @property
    def middle(self) -> int:
        """The zero point where the scheme stores none."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        """Scales of a row of ``k`` inputs."""
        return -(-k // self.group) if self.group else 1

    def padded(self, n: int, k: int) -> tuple[int, int]:
        """The shape that is stored: whole panels of rows, whole blocks of inputs."""
        return -(-n // PANEL) * PANEL, -(-k // self.block) * self.block


@dataclass(frozen=True)
class Codes:
    """A quantised matrix, unpacked: codes uint8 (N, K); scales (N, G), float16 (float32 where one scale serves the
    row); zeros uint8 (N, G), or None: all ``scheme.middle``."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None
    scheme: Scheme


# Quantises rows (r, K) into packed arrays from row ``first`` on (a multiple of 16; so is r, except at the end).
# The rows are float32, float16, or bfloat16 as uint16 bits.
Quantiser = Callable[[NDArray[Any], Scheme, Arrays, int], None]


def quantize(w: NDArray[np.float32], scheme: Scheme) -> Codes:
    """Codes of w float32 (N, K). CheckpointError if a value is not finite or float16 cannot hold a scale."""
    if not np.isfinite(w).all():
        raise CheckpointError("a weight is not a finite number; it cannot be quantised")
    if not scheme.group:
        row_scales, levels = round_rows(w)
        return Codes((levels + np.float32(scheme.middle)).astype(np.uint8), row_scales, None, scheme)
    n, k = w.shape
    groups = scheme.groups(k)
    padded = np.zeros((n, groups * scheme.group), np.float32)
    padded[:, :k] = w
    scales, zeros, levels = round_groups(padded.reshape(-1, scheme.group), scheme.bits, scheme.zeros)
    codes = (levels + zeros[:, None]).astype(np.uint8).reshape(n, -1)[:, :k]
    own_zeros = zeros.astype(np.uint8).reshape(n, groups) if scheme.zeros else None
    return Codes(np.ascontiguousarray(codes), scales.reshape(n, groups), own_zeros, scheme)


def dequantize(codes: Codes) -> NDArray[np.float32]:
    """The float32 matrix (N, K) that the codes stand for; every product is exact."""
    scheme, k = codes.scheme, codes.codes.shape[1]
    levels = codes.codes.astype(np.float32)
    levels -= _along(codes.zeros, scheme, k) if codes.zeros is not None else np.float32(scheme.middle)
    levels *= _along(codes.scales, scheme, k)
    return levels


def _along(values: NDArray[Any], scheme: Scheme, k: int) -> NDArray[np.float32]:
    """Values of the groups (N, G) as float32 of the inputs (N, k); (N, 1) for whole rows."""
    wide = values.astype(np.float32)
    return np.repeat(wide, scheme.group, axis=1)[:, :k] if scheme.group else wide


def packed_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Array name -> (shape, dtype) of a packed matrix; ``order`` (K,) int32 comes on top with act-order."""
    rows, columns = scheme.padded(n, k)
    per_byte = 8 // scheme.bits
    panels, groups = rows // PANEL, scheme.groups(k)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "weight": ((panels, columns // (4 * per_byte), PANEL, 4), np.dtype(np.uint8)),
        "scales": ((panels, groups, PANEL), np.dtype(np.float16 if scheme.group else np.float32)),
    }
    if scheme.zeros:
        shapes["zeros"] = ((panels, groups, PANEL), np.dtype(np.uint8))
    return shapes


def pack(codes: Codes, scheme: Scheme, order: NDArray[np.integer[Any]] | None = None) -> Arrays:
    """The arrays of packed_shapes. With ``order`` (K,), column i of the codes meets input ``x[order[i]]``.

    Padding has code = zero point and scale 0.
    """
    n, k = codes.codes.shape
    rows, columns = scheme.padded(n, k)
    zeros = np.full((rows, scheme.groups(k)), scheme.middle, np.uint8)
    if codes.zeros is not None:
        zeros[:n] = codes.zeros
    # A zero point read from elsewhere may be one beyond the largest code.
    full = np.repeat(np.minimum(zeros, scheme.top), columns // zeros.shape[1], axis=1)
    full[:n, :k] = codes.codes
    scales = np.zeros(zeros.shape, packed_shapes(scheme, n, k)["scales"][1])
    scales[:n] = codes.scales
    arrays: Arrays = {"weight": _pack_codes(full, scheme.bits), "scales": _to_panels(scales)}
    if scheme.zeros:
        arrays["zeros"] = _to_panels(zeros)
    if order is not None:
        if not np.array_equal(np.sort(order), np.arange(k)):
            raise CheckpointError(f"the order of inputs is not a permutation of {k} inputs")
        arrays["order"] = np.ascontiguousarray(order, np.int32)
    return arrays


def unpack(arrays: Mapping[str, NDArray[Any]], scheme: Scheme, n: int, k: int) -> Codes:
    """The codes (n, k) of packed arrays, columns in stored order. CheckpointError if a shape or dtype is wrong."""
    check_packed(arrays, scheme, n, k)
    zeros = _from_panels(arrays["zeros"], n) if scheme.zeros else None
    return Codes(
        _unpack_codes(arrays["weight"], scheme.bits)[:n, :k], _from_panels(arrays["scales"], n), zeros, scheme
    )


class Shaped(Protocol):
    """An array, or what is known of one that is still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def check_packed(arrays: Mapping[str, Shaped], scheme: Scheme, n: int, k: int) -> None:
    """CheckpointError unless the arrays are those of a packed (n, k) matrix."""
    wanted = packed_shapes(scheme, n, k)
    if "order" in arrays:
        wanted["order"] = ((k,), np.dtype(np.int32))
    for name in sorted(set(arrays) | set(wanted)):
        if name not in arrays or name not in wanted:
            state = "missing" if name in wanted else "not expected"
            raise CheckpointError(f"{scheme} matrix of {n} x {k}: array {name!r} is {state}")
        have = (arrays[name].shape, arrays[name].dtype)
        if have != wanted[name]:
            raise CheckpointError(
                f"{scheme} matrix of {n} x {k}: array {name!r} is {have[1]} {have[0]}, "
                f"expected {wanted[name][1]} {wanted[name][0]}"
            )


def dequantize_packed(
    arrays: Mapping[str, NDArray[Any]], scheme: Scheme, n: int, k: int
) -> NDArray[np.float32]:
    """The float32 matrix (n, k) of packed arrays, columns in the order of the model's inputs."""
    stored = dequantize(unpack(arrays, scheme, n, k))
    if "order" not in arrays:
        return stored
    matrix = np.empty_like(stored)
    matrix[:, arrays["order"]] = stored
    return matrix


def quantize_packed(
    blocks: Iterable[NDArray[Any]], scheme: Scheme, n: int, k: int, quantiser: Quantiser | None = None
) -> Arrays:
    """Quantise and pack a matrix (n, k) given as runs of rows in order, in a type that a Quantiser takes.

    Nothing is copied if every run but the last is a multiple of 16 rows. Raises CheckpointError if the runs do not
    make n rows of k, or as ``quantize`` does.
    """
    arrays = {name: np.zeros(shape, kind) for name, (shape, kind) in packed_shapes(scheme, n, k).items()}
    fill = quantiser or quantize_rows
    first = 0
    rest: NDArray[Any] | None = None
    for block in blocks:
        rows = block if rest is None or not len(rest) else np.concatenate((rest, block))
        whole = len(rows) // PANEL * PANEL
        if first + len(rows) > n or rows.shape[1] != k:
            raise CheckpointError(f"more rows or other columns than a matrix of {n} x {k} has")
        if whole:
            fill(rows[:whole], scheme, arrays, first)
        first, rest = first + whole, rows[whole:]
    if rest is not None and len(rest):
        fill(rest, scheme, arrays, first)
        first += len(rest)
    if first != n:
        raise CheckpointError(f"{first} rows of a matrix of {n} x {k}")
    return arrays


def quantize_rows(rows: NDArray[Any], scheme: Scheme, arrays: Arrays, first: int) -> None:
    """The Quantiser in NumPy."""
    if rows.dtype == np.uint16:
        wide: NDArray[np.float32] = (rows.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = rows.astype(np.float32)
    part = pack(quantize(wide, scheme), scheme)
    start = first // PANEL
    for name, array in part.items():
        arrays[name][start : start + len(array)] = array


def _pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Padded codes (N, K) to (N/16, K/4, 16, 4) bytes; int4: (N/16, K/8, 16, 4), inputs j and j + 4 in one byte."""
    rows, columns = codes.shape
    if bits == 8:
        return np.ascontiguousarray(
            codes.reshape(rows // PANEL, PANEL, columns // 4, 4).transpose(0, 2, 1, 3)
        )
    split = codes.reshape(rows // PANEL, PANEL, columns // 8, 2, 4)
    both = split[:, :, :, 0] | split[:, :, :, 1] << 4
    return np.ascontiguousarray(both.transpose(0, 2, 1, 3))


def _unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    panels, steps = packed.shape[:2]
    rowwise = packed.transpose(0, 2, 1, 3)
    if bits == 8:
        return rowwise.reshape(panels * PANEL, steps * 4)
    both: NDArray[np.uint8] = np.stack((rowwise & 15, rowwise >> 4), axis=3)
    return both.reshape(panels * PANEL, steps * 8)


def _to_panels(values: NDArray[Any]) -> NDArray[Any]:
    """(N16 * 16, G) to (N16, G, 16)."""
    return np.ascontiguousarray(values.reshape(-1, PANEL, values.shape[1]).transpose(0, 2, 1))


def _from_panels(values: NDArray[Any], n: int) -> NDArray[Any]:
    rowwise: NDArray[Any] = values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:n]
    return rowwise


def quantize_activations(
    x: NDArray[np.float32], run: int, wide: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """Rows x (T, K) with one scale per row and run of ``run`` inputs, as the kernels do it on the fly.

    Returns q int8 (T, P, K padded to whole runs), scale float32 (T, R), sum of q int32 (T, P, R). One piece (P = 1):
    x is scale * q. Two (``wide``, 16 bits): x is scale * (256 * first + second). A run of zeros has scale 0.
    """
    rows, k = x.shape
    count = -(-k // run)
    padded = np.zeros((rows, count * run), np.float32)
    padded[:, :k] = x
    runs = padded.reshape(rows, count, run)
    most = np.abs(runs).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    exact = runs * inverse[:, :, None]
    pieces, scale = [np.rint(exact)], most / np.float32(127)
    if wide:
        pieces.append(np.clip(np.rint((exact - pieces[0]) * np.float32(256)), -127, 127))
        scale /= np.float32(256)
    q = np.stack(pieces, axis=1).astype(np.int8)
    return q.reshape(rows, len(pieces), -1), scale, q.sum(axis=3, dtype=np.int32)
