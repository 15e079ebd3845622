"""Streaming writers of safetensors and MindSpore .ckpt: header first, then block after block, never a whole
file in memory.

MindSpore's own writer of .ckpt needs all tensors in memory; the format itself does not, so neither does this
one.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.weights.ckpt_file import CRC_BYTES, CRC_MARK
from research.qwen.weights.dtypes import BY_NAME, itemsize

ALIGNMENT = 64  # of the first tensor in a safetensors file, so that it can be used in place
CKPT_CHUNK = 512 << 20  # bytes of a tensor in one entry, as MindSpore cuts them
MAX_INT64 = (1 << 63) - 1

Progress = Callable[[int], None]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: ``blocks()`` yields its numbers in C order, already in format ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * itemsize(self.dtype)


def write_safetensors(
    stream: BinaryIO, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], progress: Progress
) -> None:
    """Write a safetensors file; the same tensors always give the same bytes. ``progress`` gets byte
    counts."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": BY_NAME[tensor.dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in tensors:
        for part in _checked(tensor):
            stream.write(part)
            progress(part.nbytes)


def write_ckpt(stream: BinaryIO, tensors: Sequence[OutputTensor], progress: Progress) -> None:
    """Write MindSpore's .ckpt (see ckpt_file for the layout), with the CRC-32 that MindSpore checks on
    demand."""
    crc = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal crc
        crc = zlib.crc32(data, crc)
        stream.write(data)

    for tensor in tensors:
        parts = _checked(tensor)
        rest = memoryview(b"")
        left = tensor.nbytes
        while True:
            chunk = min(left, CKPT_CHUNK)
            put(_entry_head(tensor, chunk))
            need = chunk
            while need:
                if not rest:
                    rest = next(parts)
                put(rest[:need])
                taken = min(need, len(rest))
                rest, need = rest[taken:], need - taken
                progress(taken)
            left -= chunk
            if not left:
                break
        for _ in parts:  # lets _checked see the end
            pass
    stream.write(CRC_MARK + crc.to_bytes(CRC_BYTES, "big"))


def ckpt_size(tensors: Sequence[OutputTensor]) -> int:
    """An upper bound of the bytes write_ckpt writes."""
    return sum(t.nbytes + 256 * (1 + t.nbytes // CKPT_CHUNK) for t in tensors) + len(CRC_MARK) + CRC_BYTES


def safetensors_size(tensors: Sequence[OutputTensor]) -> int:
    """An upper bound of the bytes write_safetensors writes."""
    return sum(tensor.nbytes + 256 for tensor in tensors) + 4096


def _checked(tensor: OutputTensor) -> Iterator[memoryview]:
    """The bytes of a tensor block by block; CheckpointError if their number is not what the shape says."""
    written = 0
    for block in tensor.blocks():
        part = (
            memoryview(np.ascontiguousarray(block).view(np.uint8).data) if block.nbytes else memoryview(b"")
        )
        written += part.nbytes
        if written > tensor.nbytes:
            break
        if part.nbytes:
            yield part
    if written != tensor.nbytes:
        raise CheckpointError(
            f"{tensor.name}: {written} bytes for shape {tensor.shape}, expected {tensor.nbytes}"
        )


def _entry_head(tensor: OutputTensor, chunk: int) -> bytes:
    """Everything of one entry up to its ``chunk`` bytes of content."""
    if max(tensor.shape, default=0) > MAX_INT64:
        raise CheckpointError(f"{tensor.name}: shape {tensor.shape} is too large")
    # MindSpore writes no dims for a scalar; proto2 repeated ints are one key and value each.
    dims = b"".join(b"\x08" + _varint(dim) for dim in tensor.shape)
    kind = _bytes_field(2, BY_NAME[tensor.dtype].mindspore.encode())
    body = dims + kind + _key(3) + _varint(chunk)
    tag = _bytes_field(1, tensor.name.encode())
    inner = tag + _key(2) + _varint(len(body) + chunk) + body
    return _key(1) + _varint(len(inner) + chunk) + inner


def _bytes_field(number: int, data: bytes) -> bytes:
    return _key(number) + _varint(len(data)) + data


def _key(number: int) -> bytes:
    return bytes([number << 3 | 2])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
