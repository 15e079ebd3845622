"""Tensors that are still on disk: shape and format known, numbers read when asked for, whole or block by
block.

Blocks are read into fresh buffers (pread), not through a mapping, so that a converter's resident memory stays
a few blocks high however large the file is.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import BY_NAME

BLOCK_BYTES = 8 << 20
_MADV_DONTNEED = 4


class StoredTensor(ABC):
    """A tensor in a file. ``dtype`` is a name of weights.dtypes; bfloat16 is read as its uint16 bits."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the numbers take."""
        return self.size * BY_NAME[self.dtype].numpy.itemsize

    @abstractmethod
    def read(self) -> NDArray[Any]:
        """The whole array, shape ``shape``; a view of the mapped file where the format allows it."""

    @abstractmethod
    def blocks(self) -> Iterator[NDArray[Any]]:
        """The numbers in C order as one-dimensional arrays of at most BLOCK_BYTES."""


class MappedFile:
    """One open file, mapped on first use and read by position; shared by all tensors in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:
            os.close(fd)

    @cached_property
    def bytes(self) -> NDArray[np.uint8]:
        """The file as a read-only byte array."""
        return np.memmap(self.path, np.uint8, "r").view(np.ndarray)

    def pread(self, offset: int, count: int) -> bytearray:
        """``count`` bytes from ``offset``; CheckpointError if the file ends before."""
        out = bytearray(count)
        view, done = memoryview(out), 0
        while done < count:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path} is truncated: ends at byte {offset + done}")
            done += got
        return out

    def forget(self, offset: int, count: int) -> None:
        """Tell the kernel that these bytes need not stay in its cache (a hint)."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file."""

    offset: int
    count: int


class FileTensor(StoredTensor):
    """Numbers that lie in a file as they are, in one run of bytes or several."""

    def __init__(
        self, file: MappedFile, shape: tuple[int, ...], dtype: str, extents: Sequence[Extent]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._extents = file, tuple(extents)

    def read(self) -> NDArray[Any]:
        kind = BY_NAME[self.dtype].numpy
        if len(self._extents) == 1:
            part = self._extents[0]
            flat = self._file.bytes[part.offset : part.offset + part.count]
            if part.offset % kind.itemsize == 0:
                return flat.view(kind).reshape(self.shape)
            return flat.copy().view(kind).reshape(self.shape)  # unaligned: C code may not read it in place
        whole = np.empty(self.nbytes, np.uint8)
        done = 0
        for part in self._extents:
            whole[done : done + part.count] = self._file.bytes[part.offset : part.offset + part.count]
            done += part.count
        return whole.view(kind).reshape(self.shape)

    def blocks(self) -> Iterator[NDArray[Any]]:
        kind = BY_NAME[self.dtype].numpy
        rest = b""  # part of a number at the end of an extent
        for part in self._extents:
            for start in range(0, part.count, BLOCK_BYTES):
                count = min(BLOCK_BYTES, part.count - start)
                data = self._file.pread(part.offset + start, count)
                if rest:
                    data = bytearray(rest) + data
                whole = len(data) - len(data) % kind.itemsize
                rest = bytes(data[whole:])
                yield np.frombuffer(data, kind, whole // kind.itemsize)


class JoinedTensor(StoredTensor):
    """Several tensors joined along the first axis."""

    def __init__(self, parts: Sequence[StoredTensor]) -> None:
        tails, dtypes = {part.shape[1:] for part in parts}, {part.dtype for part in parts}
        if len(tails) != 1 or len(dtypes) != 1 or any(not part.shape for part in parts):
            raise CheckpointError(f"tensors of shapes {[part.shape for part in parts]} cannot be joined")
        self.shape = (sum(part.shape[0] for part in parts), *tails.pop())
        self.dtype = dtypes.pop()
        self._parts = tuple(parts)

    def read(self) -> NDArray[Any]:
        return np.concatenate([part.read() for part in self._parts])

    def blocks(self) -> Iterator[NDArray[Any]]:
        for part in self._parts:
            yield from part.blocks()


def let_go(block: NDArray[Any]) -> None:
    """Drop the mapped pages wholly inside a block from memory; they come back from the file if touched
    again."""
    start = -(-block.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (block.ctypes.data + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if end > start and hasattr(libc, "madvise"):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
