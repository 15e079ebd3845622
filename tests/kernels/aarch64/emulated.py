"""A kernel library of another processor, run by qemu and used like a NativeLibrary."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from research.qwen.kernels.native_quantize import NativeQuantiser
from research.qwen.quant.schemes import PANEL, Scheme

ISA, THREADS, CALL, QUANTISE = range(4)


class EmulatedLibrary:
    """The part of NativeLibrary that tests use. Every array is sent with each call and its new content comes back."""

    def __init__(self, command: list[str], library: Path, isa: str) -> None:
        """``command`` starts the driver; ``isa`` is the value of QWEN_ISA ("" for none)."""
        self._process = subprocess.Popen(
            [*command, str(library)],
            env={**os.environ, "QWEN_ISA": isa},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._lock = threading.Lock()
        self._threads = 1
        with self._lock:
            self._send(struct.pack("=i", ISA))
            self.isa = self._receive(self._number()).decode()

    def close(self) -> None:
        """End the emulator; it must have no complaint."""
        self._process.communicate()
        assert self._process.returncode == 0, f"the driver has ended with {self._process.returncode}"

    def set_threads(self, count: int) -> None:
        """Threads of every kernel."""
        with self._lock:
            self._send(struct.pack("=ii", THREADS, count))
            self._threads = self._number()

    @property
    def threads(self) -> int:
        """Threads in use, as the library has answered."""
        return self._threads

    def bind(self, name: str, inputs: list[np.ndarray], output: np.ndarray) -> Callable[[], int]:
        """As NativeLibrary.bind. Addresses modulo 64 are kept, and an array given twice is one there, too."""
        arrays = [*inputs, output]
        places = [(array.ctypes.data, array.nbytes) for array in arrays]
        same = [places.index(place) for place in places]

        def run() -> int:
            with self._lock:
                self._send(
                    struct.pack("=ii", CALL, len(name)) + name.encode() + struct.pack("=i", len(arrays))
                )
                for array, index in zip(arrays, same, strict=True):
                    self._send_array(array)
                    self._send(struct.pack("=i", index), flush=False)
                self._send(b"")
                result = self._number()
                for array in arrays:
                    self._store(array, self._receive(array.nbytes))
                return result

        return run

    def quantise(self, about: list[int], rows: np.ndarray, packed: list[np.ndarray]) -> int:
        """QwenQuantise: about is format, rows, columns, bits, group, zeros; packed is weight, scales, points."""
        with self._lock:
            self._send(struct.pack("=i6q", QUANTISE, *about))
            for array in (rows, *packed):
                self._send_array(array)
            self._send(b"")
            faults = self._number()
            for array in packed:
                self._store(array, self._receive(array.nbytes))
            return faults

    def _send_array(self, array: np.ndarray) -> None:
        head = struct.pack(f"=i{array.ndim}q", array.ndim, *array.shape)
        self._send(head + struct.pack("=qi", array.nbytes, array.ctypes.data % 64), flush=False)
        self._send(array.tobytes(), flush=False)

    @staticmethod
    def _store(array: np.ndarray, data: bytes) -> None:
        if data != array.tobytes():  # read-only inputs stay as they are
            array[...] = np.frombuffer(data, array.dtype).reshape(array.shape)

    def _send(self, data: bytes, flush: bool = True) -> None:
        pipe: Any = self._process.stdin
        pipe.write(data)
        if flush:
            pipe.flush()

    def _receive(self, count: int) -> bytes:
        pipe: Any = self._process.stdout
        data: bytes = pipe.read(count)
        assert len(data) == count, "the emulated process has ended; its message is above"
        return data

    def _number(self) -> int:
        return int(struct.unpack("=i", self._receive(4))[0])


class EmulatedQuantiser(NativeQuantiser):
    """The C++ quantiser of an emulated library."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self._native: Any = library
        self._threads = None
        self._function = self._call

    def _call(
        self, rows: int, code: int, count: int, k: int, bits: int, group: int, zeros: int, *to: Any
    ) -> int:
        """QwenQuantise as ctypes would call it, with addresses; the sizes of the arrays follow from the format."""
        panels, block = -(-count // PANEL), group or Scheme(8, 0, False).block
        blocks = -(-k // block)
        scales = panels * PANEL * (blocks if group else 1)
        sizes = [panels * PANEL * blocks * block * bits // 8, scales * (2 if group else 4), scales * zeros]
        packed = [_bytes_at(address, size) for address, size in zip(to, sizes, strict=True)]
        source = _bytes_at(rows, count * k * (2 if code else 4))
        return self._native.quantise([code, count, k, bits, group, zeros], source, packed)


def _bytes_at(address: int | None, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address or 0))
