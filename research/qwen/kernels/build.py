"""Compiles the C++ kernels: at install into the package, else at first use into the user's cache folder.

Imports no MindSpore, and nothing outside the standard library: setup.py runs it too.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from research.qwen.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"  # where a wheel carries the library
# -ffp-contract=off: the sources say where a multiply and an add are one rounding, so that all code paths agree.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=default",
    "-pthread",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
VNNI = (*AVX512, "-mavx512vnni", "-mavx512bf16")
AMX = (*VNNI, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
DOT = ("-march=armv8.2-a+dotprod",)
# Portable sources, and groups of kernels (GROUP_isa.cc, entry point GROUP_ISA) with their instruction sets.
PORTABLE = tuple(
    "isa pool linear attention pointwise quantise quant lora layer training text_attention product "
    "ops ops_attention ops_quant ops_layer ops_training".split()
)
X86 = {"base": (), "avx2": AVX2, "avx512": AVX512, "vnni": VNNI, "amx": AMX}
ARM = {"base": (), "dot": DOT}
FLOATS = ("base", "avx2", "avx512")
INTEGERS = ("base", "avx2", "avx512", "vnni", "amx", "dot")
GROUPS = {
    "linear": FLOATS,
    "attention": (*FLOATS, "amx"),
    "pointwise": FLOATS,
    "quantise": FLOATS,
    "quant": INTEGERS,
    "training": FLOATS,
    "text_attention": FLOATS,
    "product": FLOATS,
}

NOTICE_SECONDS = 2.0  # a build that takes longer says so
OBJECT_DAYS = 30  # objects nobody used for so long are removed from the cache

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_log = logging.getLogger(__name__)
Texts = Mapping[str, bytes]


def variants(machine: str) -> dict[str, tuple[str, ...]]:
    """Instruction sets a machine (``platform.machine()``) may have, with the compiler's flags."""
    if machine in ("x86_64", "AMD64"):
        return X86
    return ARM if machine == "aarch64" else {"base": ()}


def units(machine: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """What is compiled: (object name, source name, flags), portable sources first."""
    plain: list[tuple[str, str, tuple[str, ...]]] = [(name, name, ()) for name in PORTABLE]
    flags = variants(machine)
    return plain + [
        (f"{group}_{isa}", f"{group}_isa", (*flags[isa], f"-DQWEN_TABLE={group}_{isa}"))
        for group, isas in GROUPS.items()
        for isa in isas
        if isa in flags
    ]


def find_compiler() -> str:
    """Path of the C++ compiler: environment variable CXX, else g++, else clang++; KernelError if there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return os.path.abspath(found)
    looked = f"CXX={wanted}" if wanted else "g++ or clang++"
    raise KernelError(f"no C++ compiler found ({looked}): install g++, or use the backend 'reference'")


def cache_folder() -> Path:
    """Where built libraries are kept: QWEN_CACHE_DIR, else XDG_CACHE_HOME/qwen-mindspore, else ~/.cache/..."""
    own = os.environ.get("QWEN_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-mindspore"


def library_path() -> Path:
    """The shared library of the kernels: the one installed with the package if it was made from these sources for
    this machine, else one in the cache folder, built if these sources and this compiler have not been seen before.

    Raises KernelError when there is no compiler, it fails, or the cache folder cannot be written.
    """
    machine, texts = platform.machine(), source_texts()
    print_of_sources = fingerprint(machine, texts)
    shipped = SHIPPED / f"kernels-{print_of_sources}.so"
    if shipped.exists() and _loads(shipped):
        return shipped
    compiler = find_compiler()
    maker = hashlib.sha256(_compiler_version(compiler).encode()).hexdigest()[:8]
    target = cache_folder() / f"kernels-{print_of_sources}-{maker}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _build(compiler, machine, target, target.parent / "objects", texts)
    except OSError as error:
        raise KernelError(
            f"cannot build the C++ kernels in {target.parent}: {error.strerror or error}; set QWEN_CACHE_DIR to a "
            "writable folder"
        ) from error
    return target


def build_library(compiler: str, machine: str, target: Path, objects: Path | None = None) -> None:
    """Compile the kernels for a machine (a name as ``platform.machine()`` gives it) into the file ``target``.

    The compiler may be a cross compiler for that machine. ``objects`` is a folder where compiled objects are kept and
    looked up. Raises KernelError when the compiler fails, OSError when a folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _build(compiler, machine, target, objects, source_texts())


def source_texts() -> dict[str, bytes]:
    """All sources and headers by file name, read once, so that what is hashed is what is compiled."""
    return {p.name: p.read_bytes() for p in sorted(SOURCES.iterdir()) if p.suffix in (".cc", ".h")}


def fingerprint(machine: str, texts: Texts) -> str:
    """Names a library: what it is compiled from, with which flags, for which machine; not with which compiler."""
    digest = hashlib.sha256(repr((machine, FLAGS)).encode())
    for name, source, flags in units(machine):
        digest.update(repr((name, flags, _reach(source, texts))).encode())
    return digest.hexdigest()[:16]


def _reach(source: str, texts: Texts) -> tuple[tuple[str, str], ...]:
    """A source and every header it includes, directly or not, each with the hash of its text."""
    found: dict[str, str] = {}
    waiting = [f"{source}.cc"]
    while waiting:
        name = waiting.pop()
        if name not in found and name in texts:
            found[name] = hashlib.sha256(texts[name]).hexdigest()
            waiting += [header.decode() for header in _INCLUDE.findall(texts[name])]
    return tuple(sorted(found.items()))


def _loads(path: Path) -> bool:
    """Whether a shipped library works here: one made on a newer system may want newer system libraries."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning(
            "the kernels that came with the package cannot be loaded (%s); building them here", error
        )
        return False
    return True


@lru_cache(maxsize=4)
def _compiler_version(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler {compiler} does not run: {error}") from None
    return f"{compiler}\n{done.stdout}"


@dataclass(frozen=True)
class _Job:
    """One source to compile: the command, run in the folder of the sources, and the object it makes."""

    command: list[str]
    made: Path
    kept: Path | None  # where the object goes afterwards


def _build(compiler: str, machine: str, target: Path, objects: Path | None, texts: Texts) -> None:
    began = time.monotonic()
    target, objects = target.absolute(), objects.absolute() if objects else None
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as name:
        folder = Path(name)
        for file, text in texts.items():
            (folder / file).write_bytes(text)
        made, jobs = _plan(compiler, machine, folder, objects, texts)
        _compile(jobs, folder)
        library = folder / target.name
        _run([compiler, "-shared", "-pthread", *map(str, made), "-o", str(library)], folder)
        library.replace(target)
    if objects:
        _prune(objects)
    _log.info(
        "built the C++ kernels: %s, %d of %d objects, %.1f s",
        target,
        len(jobs),
        len(made),
        time.monotonic() - began,
    )


def _plan(
    compiler: str, machine: str, folder: Path, objects: Path | None, texts: Texts
) -> tuple[list[Path], list[_Job]]:
    """All objects of the library, and the jobs that make those which are not kept from an earlier build."""
    if objects:
        objects.mkdir(parents=True, exist_ok=True)
    all_objects: list[Path] = []
    jobs = []
    for name, source, extra in units(machine):
        command = [compiler, *FLAGS, *extra, "-c", f"{source}.cc", "-o"]
        key = repr((_compiler_version(compiler), command, _reach(source, texts)))
        kept = objects / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.o" if objects else None
        if kept and kept.exists():
            os.utime(kept)
        else:
            # Compiled under a name of its own and then moved: no other build ever sees half an object.
            made = folder / f"{name}.o"
            jobs.append(_Job([*command, str(made)], made, kept))
        all_objects.append(kept or folder / f"{name}.o")
    jobs.sort(key=lambda job: -len(texts.get(job.command[-3], b"")))  # the longest first
    return all_objects, jobs


def _compile(jobs: Sequence[_Job], folder: Path) -> None:
    """Runs the jobs, as many at a time as there are processors; the first failure ends it."""
    done = 0

    def notice() -> None:
        _log.warning("compiling the C++ kernels (once): %d of %d files done", done, len(jobs))

    timer = threading.Timer(NOTICE_SECONDS, notice)
    timer.daemon = True
    timer.start()
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    try:
        running = {pool.submit(_run, job.command, folder): job for job in jobs}
        for future in as_completed(running):
            future.result()
            job = running[future]
            if job.kept:
                job.made.replace(job.kept)
            done += 1
    finally:
        timer.cancel()
        pool.shutdown(cancel_futures=True)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
    except OSError as error:
        raise KernelError(f"the C++ compiler {command[0]} does not run: {error.strerror}") from None
    if done.returncode:
        first = "\n".join(done.stderr.strip().splitlines()[:8])
        raise KernelError(
            f"{command[0]} could not compile the C++ kernels (exit {done.returncode}):\n{first}"
        )


def _prune(objects: Path) -> None:
    oldest = time.time() - OBJECT_DAYS * 86400
    for path in objects.glob("*.o"):
        with suppress(OSError):  # another build may have removed it
            if path.stat().st_mtime < oldest:
                path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process builds; the others wait and then find the library."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Build the library now, for this machine or another; prints its path."""
    parser = argparse.ArgumentParser(prog="python -m research.qwen.kernels.build", description=main.__doc__)
    parser.add_argument(
        "--output", type=Path, help="file to write (default: where this machine looks for it)"
    )
    parser.add_argument(
        "--compiler", help="C++ compiler, for example aarch64-linux-gnu-g++ (default: CXX, g++)"
    )
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64 (default: this one)")
    args = parser.parse_args(argv)
    if not args.output and (args.compiler or args.machine != platform.machine()):
        parser.error("--compiler and --machine need --output")
    try:
        if args.output:
            build_library(args.compiler or find_compiler(), args.machine, args.output)
        print(args.output or library_path())
    except (KernelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
