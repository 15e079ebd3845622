"""One matrix of a checkpoint in the format asked for: as stored, converted, quantised or unpacked.

Imports no MindSpore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.quant.gptq import SUFFIXES, GptqFormat, from_gptq
from research.qwen.quant.schemes import (
    PANEL,
    Arrays,
    Quantiser,
    Scheme,
    check_packed,
    dequantize_packed,
    packed_shapes,
    quantize_packed,
)
from research.qwen.weights.dtypes import BY_NAME, convert_block, itemsize
from research.qwen.weights.quantised import PARTS
from research.qwen.weights.readers import Checkpoint
from research.qwen.weights.tensors import FileTensor, let_go

Parts = dict[str, tuple[tuple[int, ...], str]]  # part ("weight", "scales", ...) -> shape and number format


@dataclass
class Matrix:
    """A matrix ready to be loaded: its format, its arrays by part, and how to make them.

    ``work`` counts the stored bytes that have to be computed with (0 if the arrays are only mapped); ``progress`` is
    told of them as they are done.
    """

    format: str
    parts: Parts
    make: Callable[[Callable[[int], None]], Arrays]
    work: int = 0
    progress: Callable[[int], None] = staticmethod(lambda count: None)

    def load(self) -> Arrays:
        """The arrays by part; CheckpointError if they cannot be had."""
        return self.make(self.progress)


@dataclass(frozen=True)
class Plain:
    """A matrix stored as floats."""

    checkpoint: Checkpoint
    name: str
    n: int
    k: int

    @property
    def tensor(self) -> str:
        """Name of the stored tensor."""
        return f"{self.name}.weight"

    @property
    def format(self) -> str:
        """float32, float16 or bfloat16."""
        return self.checkpoint.dtype(self.tensor)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.n * self.k * itemsize(self.format)

    def rows(self, progress: Callable[[int], None]) -> Iterator[NDArray[Any]]:
        """Runs of rows (r, K), r a multiple of 16 except in the last; read and not mapped: no page of the file
        stays in memory."""
        step = PANEL * self.k
        rest: NDArray[Any] | None = None
        for block in self.checkpoint.blocks(self.tensor):
            flat = block if rest is None or not rest.size else np.concatenate((rest, block))
            whole = flat.size // step * step
            if whole:
                yield flat[:whole].reshape(-1, self.k)
            rest = flat[whole:]
            progress(block.nbytes)
        if rest is not None and rest.size:
            yield rest.reshape(-1, self.k)


@dataclass(frozen=True)
class Packed:
    """A matrix stored quantised: the tensors that hold it, and how they become packed arrays."""

    format: str
    scheme: Scheme
    n: int
    k: int
    tensors: tuple[str, ...]
    parts: Parts
    unpack: Callable[[], Arrays]
    mapped: bool
    nbytes: int

    @classmethod
    def ours(cls, checkpoint: Checkpoint, name: str, scheme: Scheme, n: int, k: int) -> Packed:
        """From packed arrays; CheckpointError if they are not those of the scheme."""
        parts = {part: f"{name}.{part}" for part in PARTS}
        have = {part: tensor for part, tensor in parts.items() if tensor in set(checkpoint.names())}

        def unpack() -> Arrays:
            return {part: checkpoint.read(tensor) for part, tensor in have.items()}

        shapes: Parts = {
            part: (checkpoint.shape(tensor), checkpoint.dtype(tensor)) for part, tensor in have.items()
        }
        try:
            check_packed({part: _Stored(*found) for part, found in shapes.items()}, scheme, n, k)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        size = sum(checkpoint.tensor(tensor).nbytes for tensor in have.values())
        return cls(str(scheme), scheme, n, k, tuple(have.values()), shapes, unpack, True, size)

    @classmethod
    def gptq(cls, checkpoint: Checkpoint, name: str, fmt: GptqFormat, zeros: bool, n: int, k: int) -> Packed:
        """From AutoGPTQ's tensors; CheckpointError if one is missing or of wrong shape."""
        tensors = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
        missing = [tensor for tensor in tensors.values() if tensor not in set(checkpoint.names())]
        if missing:
            raise CheckpointError(
                f"{checkpoint.files[0]}: {missing[0]} is missing; download the checkpoint again"
            )
        for suffix, (shape, kind) in fmt.shapes(n, k).items():
            have = (checkpoint.shape(tensors[suffix]), checkpoint.dtype(tensors[suffix]))
            if have != (shape, kind.name):
                raise CheckpointError(
                    f"{tensors[suffix]} is {have[1]} {have[0]}, expected {kind.name} {shape} for a matrix of {n} x {k} "
                    f"with {fmt.bits} bits and groups of {fmt.group}"
                )
        scheme = Scheme(fmt.bits, fmt.group, zeros)
        g_idx = checkpoint.read(tensors["g_idx"])
        shapes = _parts(scheme, n, k, ordered=not np.array_equal(g_idx, np.arange(k) // fmt.group))

        def unpack() -> Arrays:
            module = {suffix: checkpoint.read(tensor) for suffix, tensor in tensors.items()}
            arrays = from_gptq(module, fmt, n, k, zeros)[1]
            mapped = isinstance(checkpoint.tensor(tensors["qweight"]), FileTensor)
            if mapped and not module["qweight"].flags.writeable:  # else it is a copy
                let_go(module["qweight"])  # so that memory holds the packed arrays only
            return arrays

        size = sum(checkpoint.tensor(tensor).nbytes for tensor in tensors.values())
        return cls(str(scheme), scheme, n, k, tuple(tensors.values()), shapes, unpack, False, size)


class _Stored:
    """Shape and type of a tensor that is still on disk, as check_packed looks at them."""

    def __init__(self, shape: tuple[int, ...], kind: str) -> None:
        self.shape, self.dtype = shape, BY_NAME[kind].numpy


def plain_matrix(stored: Plain, wanted: str | None, quantiser: Quantiser | None) -> Matrix:
    """A matrix stored as floats in the format ``wanted`` (None: as stored)."""
    shape = (stored.n, stored.k)
    if wanted in (None, stored.format):
        return Matrix(
            stored.format,
            {"weight": (shape, stored.format)},
            lambda progress: {"weight": stored.checkpoint.read(stored.tensor)},
        )
    if wanted in ("float32", "float16", "bfloat16"):
        return Matrix(
            wanted,
            {"weight": (shape, wanted)},
            lambda progress: {"weight": _converted(stored, wanted, progress)},
            stored.nbytes,
        )
    scheme = Scheme.parse(wanted)

    def quantise(progress: Callable[[int], None]) -> Arrays:
        return quantize_packed(stored.rows(progress), scheme, *shape, quantiser)

    return Matrix(wanted, _parts(scheme, *shape), quantise, stored.nbytes)


def packed_matrix(stored: Packed, wanted: str) -> Matrix:
    """A quantised matrix as it is stored, or as float32."""

    def unpack(progress: Callable[[int], None]) -> Arrays:
        arrays = stored.unpack()
        if wanted == "float32":
            arrays = {"weight": dequantize_packed(arrays, stored.scheme, stored.n, stored.k)}
        progress(stored.nbytes)
        return arrays

    if wanted == "float32":
        return Matrix(wanted, {"weight": ((stored.n, stored.k), wanted)}, unpack, stored.nbytes)
    return Matrix(wanted, stored.parts, unpack, 0 if stored.mapped else stored.nbytes)


def _parts(scheme: Scheme, n: int, k: int, ordered: bool = False) -> Parts:
    parts = {part: (shape, kind.name) for part, (shape, kind) in packed_shapes(scheme, n, k).items()}
    return {**parts, "order": ((k,), "int32")} if ordered else parts


def _converted(stored: Plain, wanted: str, progress: Callable[[int], None]) -> NDArray[Any]:
    out = np.empty(stored.n * stored.k, BY_NAME[wanted].numpy)
    at = infinite = 0
    for block in stored.checkpoint.blocks(stored.tensor):
        changed, lost = convert_block(block, stored.format, wanted)
        out[at : at + changed.size] = changed
        at, infinite = at + changed.size, infinite + lost
        progress(block.nbytes)
    if infinite:
        raise CheckpointError(f"{infinite} values are too large for {wanted}: they would become infinite")
    return out.reshape(stored.n, stored.k)
