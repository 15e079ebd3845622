"""TensorBoard event files with scalars, written by hand: 40 lines instead of a package.

tensorboardX would do, but importing it imports PyTorch wherever that is installed: seconds, and 200 MB in every run.

An event file is a row of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the data); the data
are protocol buffers: Event {1: wall_time double, 2: step int64, 3: file_version string, 5: Summary, 7: SessionLog},
Summary {1: Value}, Value {1: tag string, 2: simple_value float}, SessionLog {1: status}: drops what came earlier.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

START = 1  # SessionLog.SessionStatus: events with this step or a later one, written before, are dropped


class EventWriter:
    """Appends scalars to a new event file in ``folder``; it replaces what earlier files say from ``first_step`` on."""

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._stream = (folder / name).open("wb")
        self._put(0, _text(3, b"brain.Event:2"))
        self._put(first_step, _text(7, _key(1, 0) + _varint(START)))
        self._stream.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Values of one step, by tag."""
        with np.errstate(over="ignore"):  # too large for a float32 is infinite
            numbers = np.array(list(scalars.values()), np.float64).astype("<f4")
        values = b"".join(
            _text(1, _text(1, tag.encode()) + _key(2, 5) + number.tobytes())
            for tag, number in zip(scalars, numbers, strict=True)
        )
        self._put(step, _text(5, values))

    def flush(self) -> None:
        """Show what was added."""
        self._stream.flush()

    def close(self) -> None:
        """End the file."""
        self._stream.close()

    def _put(self, step: int, rest: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + _key(2, 0) + _varint(step) + rest
        length = struct.pack("<Q", len(event))
        self._stream.write(length + _masked(length) + event + _masked(event))


def crc32c(data: bytes) -> int:
    """CRC-32 with the Castagnoli polynomial (reflected, 0x82F63B78)."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    out = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return tuple(out)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _text(number: int, data: bytes) -> bytes:
    return _key(number, 2) + _varint(len(data)) + data


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
