"""Compiles the C++ kernels once per user, compiler and source text. Imports no MindSpore."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from research.qwen.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
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
AMX = (*VNNI, "-mamx-tile", "-mamx-int8")
DOT = ("-march=armv8.2-a+dotprod",)
# Portable sources, and groups of kernels (GROUP_isa.cc, entry point GROUP_ISA) with their instruction sets.
PORTABLE = ("isa", "pool", "linear", "attention", "pointwise", "ops", "ops_attention")
X86 = {"base": (), "avx2": AVX2, "avx512": AVX512, "vnni": VNNI, "amx": AMX}
ARM = {"base": (), "dot": DOT}
FLOATS = ("base", "avx2", "avx512")
GROUPS = {"linear": FLOATS, "attention": FLOATS, "pointwise": FLOATS}

_log = logging.getLogger(__name__)


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
            return found
    looked = f"CXX={wanted}" if wanted else "g++ or clang++"
    raise KernelError(f"no C++ compiler found ({looked}): install g++, or use the backend 'reference'")


def cache_folder() -> Path:
    """Where built libraries are kept: QWEN_CACHE_DIR, else XDG_CACHE_HOME/qwen-mindspore, else ~/.cache/..."""
    own = os.environ.get("QWEN_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-mindspore"


def library_path() -> Path:
    """The shared library of the kernels, built if this source, compiler and machine have not been seen before.

    Raises KernelError when there is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = find_compiler()
    machine = platform.machine()
    target = cache_folder() / f"kernels-{_fingerprint(compiler, machine)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _build(compiler, machine, target)
    except OSError as error:
        raise KernelError(
            f"cannot build the C++ kernels in {target.parent}: {error.strerror or error}; set QWEN_CACHE_DIR to a "
            "writable folder"
        ) from error
    return target


def _fingerprint(compiler: str, machine: str) -> str:
    digest = hashlib.sha256(_compiler_version(compiler).encode())
    digest.update(repr((machine, FLAGS, units(machine))).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4)
def _compiler_version(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler {compiler} does not run: {error}") from None
    return f"{compiler}\n{done.stdout}"


def _build(compiler: str, machine: str, target: Path) -> None:
    _log.info("building the C++ kernels with %s (once, about ten seconds)", compiler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        objects = Path(folder)
        jobs = [
            (SOURCES / f"{source}.cc", objects / f"{name}.o", flags) for name, source, flags in units(machine)
        ]
        running = [
            _start([compiler, *FLAGS, *extra, "-c", str(src), "-o", str(obj)]) for src, obj, extra in jobs
        ]
        failures = [failure for failure in map(_finish, running) if failure]
        if failures:
            raise KernelError(failures[0])
        library = objects / target.name
        failure = _finish(
            _start([compiler, "-shared", "-pthread", *(str(o) for _, o, _ in jobs), "-o", str(library)])
        )
        if failure:
            raise KernelError(failure)
        library.replace(target)
    _log.info("built %s in %.1f s", target, time.monotonic() - began)


def _start(command: list[str]) -> tuple[list[str], subprocess.Popen[str]]:
    try:
        return command, subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise KernelError(f"the C++ compiler {command[0]} does not run: {error.strerror}") from None


def _finish(job: tuple[list[str], subprocess.Popen[str]]) -> str | None:
    """None when the command has succeeded, else what to tell the user."""
    command, process = job
    _, message = process.communicate()
    if process.returncode == 0:
        return None
    first = "\n".join(message.strip().splitlines()[:8])
    return f"{command[0]} could not compile the C++ kernels (exit {process.returncode}):\n{first}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process builds; the others wait and then find the library."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
