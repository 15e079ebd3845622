"""Reader of MindSpore's .ckpt: protobuf wire format of the message Checkpoint, read without MindSpore.

The file is ``Checkpoint { repeated Value value = 1 }``, ``Value { string tag = 1; TensorProto tensor = 2 }``,
``TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }``. MindSpore cuts
a large tensor into consecutive values with the same tag, and may append ``crc_num`` and ten bytes holding a
CRC-32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import BY_MINDSPORE
from research.qwen.weights.tensors import BLOCK_BYTES, Extent, FileTensor, MappedFile, StoredTensor

CRC_MARK, CRC_BYTES = b"crc_num", 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Span:
    """A range of bytes of the file."""

    start: int
    end: int


@dataclass(frozen=True)
class Value:
    """One entry of the file: a tensor or a part of one."""

    tag: str
    dims: tuple[int, ...]
    dtype: str
    content: Span


def read_ckpt(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a .ckpt; only names and shapes are read.

    Raises CheckpointError if the file is truncated, encrypted or not a MindSpore checkpoint.
    """
    file = MappedFile(path)
    if file.size == 0:
        raise CheckpointError(f"{path} is empty")
    parts: dict[str, list[Value]] = {}
    previous = None
    for value in _values(file):
        if value.tag in parts and value.tag != previous:
            raise CheckpointError(f"{path}: {value.tag} occurs twice")
        parts.setdefault(value.tag, []).append(value)
        previous = value.tag
    return {tag: _tensor(file, values) for tag, values in parts.items()}


def verify_crc(path: Path) -> bool:
    """Read the whole file and compare its CRC-32; False if it carries none.

    Raises CheckpointError if the contents do not match.
    """
    file = MappedFile(path)
    stored = _stored_crc(file)
    if stored is None:
        return False
    crc, end = 0, _end(file)
    for start in range(0, end, BLOCK_BYTES):
        crc = zlib.crc32(file.pread(start, min(BLOCK_BYTES, end - start)), crc)
    if crc != stored:
        raise CheckpointError(f"{path} is damaged: its checksum is {crc:08x}, expected {stored:08x}")
    return True


def _stored_crc(file: MappedFile) -> int | None:
    tail = len(CRC_MARK) + CRC_BYTES
    if file.size < tail:
        return None
    data = bytes(file.pread(file.size - tail, tail))
    return int.from_bytes(data[len(CRC_MARK) :], "big") if data.startswith(CRC_MARK) else None


def _end(file: MappedFile) -> int:
    return file.size if _stored_crc(file) is None else file.size - len(CRC_MARK) - CRC_BYTES


def _tensor(file: MappedFile, values: list[Value]) -> StoredTensor:
    first = values[0]
    if any((value.dims, value.dtype) != (first.dims, first.dtype) for value in values):
        raise CheckpointError(f"{file.path}: parts of {first.tag} differ in shape or type")
    shape = () if first.dims == (0,) else first.dims  # MindSpore's spelling of a scalar
    tensor = FileTensor(
        file, shape, first.dtype, [Extent(v.content.start, v.content.end - v.content.start) for v in values]
    )
    have = sum(value.content.end - value.content.start for value in values)
    if have != tensor.nbytes:
        raise CheckpointError(
            f"{file.path} is truncated or damaged: {first.tag} of shape {shape} has {have} bytes, "
            f"needs {tensor.nbytes}"
        )
    return tensor


def _values(file: MappedFile) -> Iterator[Value]:
    for number, item in _fields(file, Span(0, _end(file))):
        if number != 1 or isinstance(item, int):
            raise CheckpointError(f"{file.path} is not a MindSpore checkpoint (or it is encrypted)")
        yield _value(file, item)


def _value(file: MappedFile, span: Span) -> Value:
    tag = None
    tensor = None
    for number, item in _fields(file, span):
        if number == 1 and isinstance(item, Span):
            tag = _text(file, item)
        elif number == 2 and isinstance(item, Span):
            tensor = item
        else:
            raise CheckpointError(
                f"{file.path}: an entry ({tag}) is not a plain tensor; map tensors are not supported"
            )
    if tag is None or tensor is None:
        raise CheckpointError(f"{file.path} is not a MindSpore checkpoint: an entry lacks its name or tensor")
    dims: list[int] = []
    kind, content = "", None
    for number, item in _fields(file, tensor):
        if number == 1:
            dims += [item] if isinstance(item, int) else _packed(file, item)
        elif number == 2 and isinstance(item, Span):
            kind = _text(file, item)
        elif number == 3 and isinstance(item, Span):
            content = item
        else:
            raise CheckpointError(f"{file.path}: tensor {tag} is malformed")
    if kind not in BY_MINDSPORE:
        raise CheckpointError(f"{file.path}: {tag} has unknown type {kind!r}")
    if content is None or any(dim >= 1 << 62 for dim in dims) or math.prod(dims) >= 1 << 62:
        raise CheckpointError(f"{file.path}: tensor {tag} is malformed")
    return Value(tag, tuple(dims), BY_MINDSPORE[kind].name, content)


def _text(file: MappedFile, span: Span) -> str:
    if span.end - span.start > 1 << 16:
        raise CheckpointError(
            f"{file.path} is not a MindSpore checkpoint: a name of {span.end - span.start} bytes"
        )
    try:
        return bytes(file.pread(span.start, span.end - span.start)).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file.path} is not a MindSpore checkpoint: a name is not text") from None


def _packed(file: MappedFile, span: Span) -> list[int]:
    out, at = [], span.start
    while at < span.end:
        number, at = _varint(file, at, span.end)
        out.append(number)
    return out


def _fields(file: MappedFile, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(field number, integer or byte range) of a message."""
    at = span.start
    while at < span.end:
        key, at = _varint(file, at, span.end)
        wire = key & 7
        item: int | Span
        if wire == _VARINT:
            item, at = _varint(file, at, span.end)
        elif wire in (_FIXED64, _FIXED32):
            item = Span(at, at + (8 if wire == _FIXED64 else 4))
            at = item.end
        elif wire == _BYTES:
            length, at = _varint(file, at, span.end)
            item = Span(at, at + length)
            at = item.end
        else:
            raise CheckpointError(f"{file.path} is not a MindSpore checkpoint (or it is encrypted)")
        if at > span.end:
            raise CheckpointError(f"{file.path} is truncated, or not a MindSpore checkpoint")
        yield key >> 3, item


def _varint(file: MappedFile, at: int, end: int) -> tuple[int, int]:
    data = file.pread(at, min(10, end - at))
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise CheckpointError(f"{file.path} is truncated, or not a MindSpore checkpoint")
