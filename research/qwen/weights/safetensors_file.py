"""Reader of one safetensors file: 8 bytes header length, JSON header, then the numbers, without gaps.

Strict, because a damaged download must not become a model: the header has to account for every byte of the
file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import BY_SAFETENSORS
from research.qwen.weights.tensors import Extent, FileTensor, MappedFile, StoredTensor

MAX_HEADER = 100_000_000


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file; nothing but the header is read.

    Raises CheckpointError if the file is truncated, not safetensors, or its header contradicts itself.
    """
    file, header, start = _open(path)
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, entry, file.size - start) for name, entry in header.items()}
    _check_cover(path, spans, file.size - start)
    return {
        name: FileTensor(
            file,
            tuple(header[name]["shape"]),
            BY_SAFETENSORS[header[name]["dtype"]].name,
            [Extent(start + begin, end - begin)],
        )
        for name, (begin, end) in spans.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The header's ``__metadata__``, text to text; empty if there is none. Raises as read_safetensors does."""
    found = _open(path)[1].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path} is not a safetensors file: __metadata__ is not a table of texts")
    return found


def _open(path: Path) -> tuple[MappedFile, dict[str, Any], int]:
    """The file, its header, and where the numbers start."""
    file = MappedFile(path)
    if file.size < 8:
        raise CheckpointError(f"{path} is not a safetensors file: {file.size} bytes; download it again")
    length = int.from_bytes(file.pread(0, 8), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file (header of {length} bytes in a file of "
            f"{file.size}); download it again"
        )
    return file, _parse(path, bytes(file.pread(8, length))), 8 + length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a name occurs twice")
        return out

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: header is not a JSON object")
    return header


def _span(path: Path, name: str, entry: Any, available: int) -> tuple[int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: header entry of {name} is malformed") from None
    if dtype not in BY_SAFETENSORS:
        raise CheckpointError(f"{path}: {name} has unknown dtype {dtype!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: shape or offsets of {name} are malformed")
    if begin > end or end > available:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {end} of the data, file holds {available}"
        )
    if end - begin != math.prod(shape) * BY_SAFETENSORS[dtype].numpy.itemsize:
        raise CheckpointError(f"{path}: {name} of shape {shape} does not fit its {end - begin} bytes")
    return begin, end


def _check_cover(path: Path, spans: dict[str, tuple[int, int]], available: int) -> None:
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            raise CheckpointError(
                f"{path}: data of {name} {'overlaps' if begin < reached else 'leaves a gap'}"
            )
        reached = end
    if reached != available:
        raise CheckpointError(
            f"{path}: {available - reached} bytes after the last tensor; the file is damaged"
        )
