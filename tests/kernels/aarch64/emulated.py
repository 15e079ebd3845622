"""A kernel library of another processor, run by qemu and used like a NativeLibrary."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ISA, THREADS, CALL = range(3)


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
        self.calls = 0
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
                self.calls += 1
                self._send(
                    struct.pack("=ii", CALL, len(name)) + name.encode() + struct.pack("=i", len(arrays))
                )
                for array, index in zip(arrays, same, strict=True):
                    head = struct.pack(f"=i{array.ndim}q", array.ndim, *array.shape)
                    self._send(head + struct.pack("=qi", array.nbytes, array.ctypes.data % 64), flush=False)
                    self._send(array.tobytes() + struct.pack("=i", index), flush=False)
                self._send(b"")
                result = self._number()
                for array in arrays:
                    self._store(array, self._receive(array.nbytes))
                return result

        return run

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
