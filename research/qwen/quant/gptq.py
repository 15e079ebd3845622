"""The AutoGPTQ layout of the official Int4 and Int8 checkpoints, to packed arrays and back without a changed bit.

One module (N outputs, K inputs) is stored as: ``qweight`` int32 (K * bits / 32, N), consecutive inputs in one word,
lowest bits first; ``qzeros`` int32 (G, N * bits / 32), consecutive outputs in one word, each zero point less one;
``scales`` float16 (G, N); ``g_idx`` int32 (K,), the group of every input. With act-order the groups are scattered over
the inputs: then the packed arrays hold the inputs sorted by group, and ``order`` says which input each one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.quant.schemes import GROUPS, PANEL, Arrays, Scheme, check_packed, packed_shapes

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_NIBBLES = np.uint32(0x0F0F0F0F)


@dataclass(frozen=True)
class GptqFormat:
    """What quantize_config.json says: bits of a code and inputs of a group."""

    bits: int
    group: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GptqFormat:
        """From ``quantization_config`` or quantize_config.json; ConfigError for what is not supported."""
        method, layout = raw.get("quant_method", "gptq"), raw.get("checkpoint_format", "gptq")
        if raw.get("is_marlin_format"):
            layout = "marlin"
        if method != "gptq" or layout != "gptq":
            raise ConfigError(
                f"quantised by the method {method!r} in the layout {layout!r}; only GPTQ in AutoGPTQ's first layout is "
                "read: use such a checkpoint, or quantise the original one"
            )
        bits, group = raw.get("bits"), raw.get("group_size")
        if bits not in (4, 8) or group not in GROUPS:
            raise ConfigError(
                f"GPTQ with {bits!r} bits in groups of {group!r} inputs is not supported: 4 or 8 bits, groups of "
                f"{' or '.join(map(str, GROUPS))}"
            )
        return cls(int(bits), int(group))

    def shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Array name -> (shape, dtype) of a module; CheckpointError where n or k does not fill whole words."""
        per_word = 32 // self.bits
        if n % per_word or k % per_word:
            raise CheckpointError(f"GPTQ matrix of {n} x {k}: not whole words of {per_word} codes")
        groups = -(-k // self.group)
        return {
            "qweight": ((k // per_word, n), np.dtype(np.int32)),
            "qzeros": ((groups, n // per_word), np.dtype(np.int32)),
            "scales": ((groups, n), np.dtype(np.float16)),
            "g_idx": ((k,), np.dtype(np.int32)),
        }

    def is_symmetric(self, qzeros: NDArray[np.int32]) -> bool:
        """Whether every zero point is the middle, so that none need be stored."""
        middle = (1 << (self.bits - 1)) - 1
        word = sum(middle << shift for shift in range(0, 32, self.bits))
        return bool((qzeros.view(np.uint32) == np.uint32(word)).all())


def from_gptq(
    module: Mapping[str, NDArray[Any]], fmt: GptqFormat, n: int, k: int, zeros: bool
) -> tuple[Scheme, Arrays]:
    """The scheme and packed arrays of a module with arrays SUFFIXES. ``zeros``: store zero points even if all are the
    middle, so that the modules of one checkpoint have one scheme.

    Raises CheckpointError for wrong shapes, groups that are not whole, or a zero point that a byte cannot hold.
    """
    _check(module, fmt, n, k)
    scheme = Scheme(fmt.bits, fmt.group, zeros or not fmt.is_symmetric(module["qzeros"]))
    arrays = {name: np.zeros(shape, kind) for name, (shape, kind) in packed_shapes(scheme, n, k).items()}
    order = _order(module["g_idx"], fmt.group)
    words = module["qweight"].view(np.uint32)
    if order is not None:
        arrays["order"] = order
        words = _to_words(_from_words(words, fmt.bits)[order], fmt.bits)
    _fill_panels(arrays["scales"], module["scales"])
    points = _zero_points(module["qzeros"], fmt.bits)
    if scheme.zeros:
        arrays["zeros"][:] = scheme.middle
        _fill_panels(arrays["zeros"], points)
    _fill_weight(arrays["weight"], words, np.minimum(points, scheme.top), scheme)
    return scheme, arrays


def to_gptq(arrays: Mapping[str, NDArray[Any]], scheme: Scheme, n: int, k: int) -> Arrays:
    """The arrays SUFFIXES of a module, the same bits that from_gptq was given.

    CheckpointError for a scheme that the layout does not have: no groups, or a zero point of 0.
    """
    check_packed(arrays, scheme, n, k)
    if not scheme.group:
        raise CheckpointError(f"{scheme} weights have no groups; AutoGPTQ's layout needs them")
    GptqFormat(scheme.bits, scheme.group).shapes(n, k)
    words = _merge(arrays["weight"].view(np.uint32)[..., 0], scheme.bits)
    words = words.transpose(1, 0, 2).reshape(words.shape[1], -1)
    words = np.ascontiguousarray(words[: k * scheme.bits // 32, :n])
    g_idx = np.arange(k, dtype=np.int32) // scheme.group
    if "order" in arrays:
        back = np.argsort(arrays["order"])
        g_idx = g_idx[back].astype(np.int32)
        words = _to_words(_from_words(words, scheme.bits)[back], scheme.bits)
    groups = scheme.groups(k)
    points = np.full((groups, n), scheme.middle, np.uint8)
    if scheme.zeros:
        points = _rows(arrays["zeros"], n)
        if not points.all():
            raise CheckpointError(
                "a zero point of 0 has no place in AutoGPTQ's layout, which stores it less one"
            )
    less_one = (points.astype(np.int16) - 1).astype(np.uint8) & np.uint8(scheme.top)
    qzeros = np.ascontiguousarray(_to_words(np.ascontiguousarray(less_one.T), scheme.bits).T)
    return {
        "qweight": words.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": _rows(arrays["scales"], n),
        "g_idx": g_idx,
    }


def _check(module: Mapping[str, NDArray[Any]], fmt: GptqFormat, n: int, k: int) -> None:
    for name, (shape, kind) in fmt.shapes(n, k).items():
        have = module[name]
        if have.shape != shape or have.dtype != kind:
            raise CheckpointError(
                f"GPTQ matrix of {n} x {k}, {fmt.bits} bits, groups of {fmt.group}: {name} is {have.dtype} "
                f"{have.shape}, expected {kind} {shape}"
            )


def _order(g_idx: NDArray[np.int32], group: int) -> NDArray[np.int32] | None:
    """Inputs sorted by group; None if they are already."""
    k = len(g_idx)
    sorted_groups = np.arange(k, dtype=np.int32) // group
    if np.array_equal(g_idx, sorted_groups):
        return None
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], sorted_groups):
        raise CheckpointError(f"g_idx does not assign {group} of the {k} inputs to every group")
    return order


def _zero_points(qzeros: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """(G, N) zero points: the stored numbers plus one."""
    transposed = np.ascontiguousarray(qzeros.view(np.uint32).T)
    stored = _from_words(transposed, bits).T
    if bits == 8 and (stored == 255).any():
        raise CheckpointError("a zero point of 256 is not supported (stored as 255 in qzeros)")
    return np.ascontiguousarray(stored + np.uint8(1))


def _from_words(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """(R, C) words to (R * 32 / bits, C) codes, lowest bits first."""
    per_word = 32 // bits
    out = np.empty((words.shape[0], per_word, words.shape[1]), np.uint8)
    for i in range(per_word):
        out[:, i] = (words >> np.uint32(i * bits)) & np.uint32((1 << bits) - 1)
    return out.reshape(-1, words.shape[1])


def _to_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """The inverse of _from_words."""
    per_word = 32 // bits
    parts = codes.reshape(-1, per_word, codes.shape[1])
    words = np.zeros((parts.shape[0], codes.shape[1]), np.uint32)
    for i in range(per_word):
        words |= parts[:, i].astype(np.uint32) << np.uint32(i * bits)
    return words


def _split(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Words of consecutive codes to words of a packed matrix: int4 pairs code j with code j + 4 in byte j."""
    if bits == 8:
        return words
    low, high = _spread(words & np.uint32(0xFFFF)), _spread(words >> np.uint32(16))
    high <<= np.uint32(4)
    low |= high
    return low


def _spread(half: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Four nibbles to the low halves of four bytes."""
    half = (half | half << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (half | half << np.uint32(4)) & _NIBBLES


def _merge(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """The inverse of _split."""
    if bits == 8:
        return words
    return _gather(words & _NIBBLES) | _gather(words >> np.uint32(4) & _NIBBLES) << np.uint32(16)


def _gather(bytes_: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The inverse of _spread."""
    half = (bytes_ | bytes_ >> np.uint32(4)) & np.uint32(0x00FF00FF)
    return (half | half >> np.uint32(8)) & np.uint32(0x0000FFFF)


def _fill_panels(panels: NDArray[Any], values: NDArray[Any]) -> None:
    """Values (G, N) of the groups into (N16, G, 16); what is beyond N stays."""
    groups, n = values.shape
    whole = n // PANEL
    panels[:whole] = values[:, : whole * PANEL].reshape(groups, whole, PANEL).transpose(1, 0, 2)
    if n % PANEL:
        panels[whole, :, : n % PANEL] = values[:, whole * PANEL :]


def _rows(panels: NDArray[Any], n: int) -> NDArray[Any]:
    """The inverse of _fill_panels: (G, n)."""
    return np.ascontiguousarray(panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)[:, :n])


def _fill_weight(
    weight: NDArray[np.uint8], words: NDArray[np.uint32], points: NDArray[np.uint8], scheme: Scheme
) -> None:
    """Words (K * bits / 32, N) into the packed weight; padding gets the code that stands for zero."""
    steps, n = words.shape
    whole, rest = divmod(n, PANEL)
    target = weight.view(np.uint32)[..., 0]  # (N16, padded steps, 16)
    repeated = np.uint32(0x11111111 if scheme.bits == 4 else 0x01010101)
    if rest:
        target[whole] = repeated * np.uint32(scheme.middle)
    if steps < target.shape[1]:
        _fill_panels(
            target[:, steps:],
            np.repeat(points[-1:] * repeated, target.shape[1] - steps, axis=0).astype(np.uint32),
        )
    for first in range(0, steps, 64):  # in pieces that stay in the cache
        last = min(first + 64, steps)
        _fill_panels(target[:, first:last], _split(words[first:last], scheme.bits))
