"""Output files that appear whole or not at all: written under a ``.tmp-`` name, flushed to disk, then
renamed.

An error, Ctrl-C or SIGTERM removes the temporary files; after SIGKILL they stay behind, under a name no
reader takes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from research.qwen.errors import CheckpointError

TMP_MARK = ".tmp-"


class OutputSet:
    """A group of files in one folder that become visible together, in the order they were added.

    Use as a context manager: leaving it normally renames every file to its name, leaving it by an exception
    removes them all. ``force`` allows existing files to be replaced.
    """

    def __init__(self, folder: Path, force: bool = False) -> None:
        self.folder, self._force = folder, force
        self._files: list[tuple[Path, Path]] = []
        self._made: list[Path] = []

    def __enter__(self) -> OutputSet:
        for parent in [*reversed(self.folder.parents), self.folder]:
            if not parent.exists():
                with _clear_errors(self.folder):
                    parent.mkdir()
                self._made.append(parent)
        if not self.folder.is_dir():
            raise CheckpointError(f"cannot write to {self.folder}: it is a file, not a folder")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with _clear_errors(self.folder):
                    for temporary, final in self._files:
                        os.replace(temporary, final)
                    self._sync_folder()
                self._files, self._made = [], []
        finally:
            for temporary, _final in self._files:
                temporary.unlink(missing_ok=True)
            for parent in reversed(self._made):
                with contextlib.suppress(OSError):
                    parent.rmdir()

    def refuse_existing(self, name: str) -> None:
        """CheckpointError if the file exists and may not be replaced."""
        path = self.folder / name
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; give the name of a file")
        if path.exists() and not self._force:
            raise CheckpointError(f"{path} exists; choose another name, or --force to replace it")

    def need_space(self, count: int) -> None:
        """CheckpointError if the folder's file system has fewer than ``count`` bytes free."""
        stat = os.statvfs(self.folder)
        free = stat.f_bavail * stat.f_frsize
        if free < count:
            raise CheckpointError(
                f"not enough space in {self.folder}: {size_text(count)} needed, {size_text(free)} free; "
                "free some, or write elsewhere"
            )

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        """Let ``fill`` write a file's contents; CheckpointError if the disk is full or the folder not
        writable."""
        self.refuse_existing(name)
        temporary = self.folder / f"{name}{TMP_MARK}{os.getpid()}"
        self._files.append((temporary, self.folder / name))
        with _clear_errors(self.folder), temporary.open("wb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())

    def write_text(self, name: str, text: str) -> None:
        """A small UTF-8 file; one that already has these contents is left alone."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file; one that already has these contents is left alone."""
        path = self.folder / name
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
        self.write(name, lambda stream: _put(stream, data))

    def _sync_folder(self) -> None:
        if os.name == "posix":
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextlib.contextmanager
def new_folder(
    folder: Path, force: bool = False, owned: Callable[[str], bool] = lambda name: False
) -> Iterator[OutputSet]:
    """A folder that appears whole: filled under a ``.tmp-`` name beside it, then renamed.

    An existing folder that is not empty is refused; with ``force`` its files are replaced one by one, after
    those for which ``owned(name)`` is true were removed (shards of an earlier run).
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a folder")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not force:
        raise CheckpointError(
            f"{folder} exists and is not empty; choose another folder, or --force to replace its files"
        )
    temporary = folder.with_name(f"{folder.name}{TMP_MARK}{os.getpid()}")
    try:
        with OutputSet(temporary, force=True) as output:
            yield output
        with _clear_errors(folder):
            if occupied:
                for name in sorted(path.name for path in folder.iterdir() if owned(path.name)):
                    (folder / name).unlink()
                # Configs last: until then the folder is not taken for a model.
                for path in sorted(temporary.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
                    os.replace(path, folder / path.name)
                temporary.rmdir()
            else:
                os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def cleanup_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that temporary files are removed (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _clear_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"disk full while writing to {where}: {error.strerror}") from None
        raise CheckpointError(f"cannot write to {where}: {error.strerror or error}") from None


def _put(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def size_text(count: int) -> str:
    """A byte count for people: ``15.4 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
