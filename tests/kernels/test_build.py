"""Building the kernel library: where it goes, when it is rebuilt, and what a user sees when it fails."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research.qwen.errors import KernelError
from research.qwen.kernels import build

# Not for the fast run: the builds take seconds. MindSpore itself is not needed.
pytestmark = pytest.mark.mindspore

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake {version}"; exit 0; fi
echo run >> "{folder}/runs"
{body}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo library > "$2"; fi; shift; done
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A stand-in compiler that takes no time; returns a function to write it anew."""

    def write(body: str = "", version: str = "1") -> Path:
        path = tmp_path / "bin" / "fake++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE.format(version=version, folder=tmp_path, body=body))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        build._compiler_version.cache_clear()
        return path

    monkeypatch.setenv("CXX", str(write()))
    monkeypatch.setenv("QWEN_CACHE_DIR", str(tmp_path / "cache"))
    return write


@pytest.fixture
def own_sources(tmp_path, monkeypatch):
    """A copy of the sources that a test may change."""
    folder = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, folder)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def runs(folder: Path) -> int:
    """How often the stand-in compiler has compiled or linked."""
    log = folder / "runs"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_built_once_and_then_found(fake, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = build.library_path()
    assert first.parent == tmp_path / "cache" and first.suffix == ".so" and first.read_text() == "library\n"
    assert "built the C++ kernels" in caplog.text
    count = runs(tmp_path)
    caplog.clear()
    assert build.library_path() == first
    assert runs(tmp_path) == count and not caplog.records
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == [first.with_suffix(".lock").name, first.name, "objects"], "temporary files are gone"


def test_a_changed_source_compiles_its_own_objects_only(fake, tmp_path, own_sources):
    build.library_path()
    everything = len(build.units(platform.machine()))
    compiled = []
    for name in ("pool.cc", "linear_isa.cc", "linear.h", "vec.h"):
        (own_sources / name).write_bytes((own_sources / name).read_bytes() + b"// changed\n")
        before = runs(tmp_path)
        assert build.library_path().exists()
        compiled.append(runs(tmp_path) - before - 1)
    isas = len(set(build.GROUPS["linear"]) & set(build.variants(platform.machine())))
    assert compiled[:2] == [1, isas], "a portable source; a group on each instruction set"
    assert isas < compiled[2] < everything, "a header: those that include it, also through another header"
    assert compiled[2] < compiled[3] < everything
    (own_sources / "not_listed.cc").write_text("int unused;\n")
    before = runs(tmp_path)
    assert build.library_path().exists() and runs(tmp_path) == before


def test_objects_nobody_uses_are_removed(fake, tmp_path):
    build.library_path()
    objects = tmp_path / "cache" / "objects"
    old, used = objects / "old.o", sorted(objects.iterdir())[0]
    old.write_text("")
    long_ago = time.time() - (build.OBJECT_DAYS + 1) * 86400
    for path in (old, used):
        os.utime(path, (long_ago, long_ago))
    fake(version="2")  # another library of the same sources
    build.library_path()
    assert not old.exists() and not used.exists()


def test_a_relative_cache_folder(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_CACHE_DIR", "here")
    assert build.library_path().resolve().parent == tmp_path / "here"


def test_a_long_build_says_so_once(fake, caplog, monkeypatch):
    monkeypatch.setattr(build, "NOTICE_SECONDS", 0.05)
    fake(body="sleep 0.05")
    build.library_path()
    assert caplog.text.count("compiling the C++ kernels") == 1


def test_command_line(fake, tmp_path, capsys):
    assert build.main([]) == 0
    assert capsys.readouterr().out == f"{build.library_path()}\n"
    target = tmp_path / "deep" / "arm.so"
    assert build.main(["--machine", "aarch64", "--output", str(target)]) == 0
    assert target.read_text() == "library\n" and [path.name for path in target.parent.iterdir()] == ["arm.so"]
    fake(body="exit 1")
    assert build.main(["--output", str(target)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        build.main(["--machine", "aarch64"])


def test_another_compiler_source_or_flag_is_another_library(fake, monkeypatch, request):
    paths = {build.library_path()}
    fake(version="2")
    paths.add(build.library_path())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    paths.add(build.library_path())
    sources = request.getfixturevalue("own_sources")
    assert build.library_path() in paths, "the place of the sources does not matter"
    (sources / "vec.h").write_text("// changed\n")
    paths.add(build.library_path())
    assert len(paths) == 4


def test_a_failing_compiler_is_quoted_and_leaves_nothing(fake, tmp_path):
    fake(body='echo "kernels.cc:1: error: no such thing" >&2; exit 3')
    with pytest.raises(KernelError, match="no such thing") as caught:
        build.library_path()
    assert "exit 3" in str(caught.value)
    left = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert left == ["objects"] and not list((tmp_path / "cache" / "objects").iterdir())
    fake()
    assert build.library_path().exists()


def test_a_library_that_came_with_the_package(fake, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(build, "SHIPPED", folder)
    built = build.library_path()
    shipped = folder / f"kernels-{build.fingerprint(platform.machine(), build.source_texts())}.so"
    shipped.write_bytes(b"for a system unlike this one")
    assert build.library_path() == built and "cannot be loaded" in caplog.text
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: None)
    assert build.library_path() == shipped
    monkeypatch.setenv("CXX", "nowhere++")
    assert build.library_path() == shipped, "needs no compiler"
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(KernelError, match=r"nowhere\+\+"):
        build.library_path()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match=r"install g\+\+, or use the backend 'reference'"):
        build.library_path()
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(KernelError, match=r"CXX=nowhere\+\+"):
        build.library_path()


def test_cache_folder_that_cannot_be_written(fake, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(KernelError, match="QWEN_CACHE_DIR"):
        build.library_path()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "qwen-mindspore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "qwen-mindspore"
    monkeypatch.setenv("QWEN_CACHE_DIR", str(tmp_path / "own"))
    assert build.cache_folder() == tmp_path / "own"


def test_two_processes_build_once(fake, tmp_path):
    fake(body="sleep 0.1")
    code = "from research.qwen.kernels.build import library_path; print(library_path())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = {process.communicate()[0] for process in started}
    assert len(answers) == 1 and answers.pop().strip().endswith(".so")
    assert runs(tmp_path) == len(build.units(platform.machine())) + 1, "every unit once, one link"


def test_no_flag_ties_the_library_to_this_processor():
    assert set(build.variants("x86_64")) == {"base", "avx2", "avx512", "vnni", "amx"}
    assert set(build.variants("aarch64")) == {"base", "dot"}
    flags = [*build.FLAGS, *(flag for isa in build.variants("x86_64").values() for flag in isa)]
    assert not any(flag.startswith(("-march", "-mtune", "-ffast-math")) for flag in flags)
    arm = [flag for isa in build.variants("aarch64").values() for flag in isa]
    assert not any("native" in flag or "fast-math" in flag for flag in arm)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_units_of_a_machine(machine):
    """Every portable source once, every group for the instruction sets it names and the machine may have."""
    units = build.units(machine)
    names = [name for name, _, _ in units]
    assert len(set(names)) == len(names) and set(build.PORTABLE) < set(names)
    assert all((build.SOURCES / f"{source}.cc").is_file() for _, source, _ in units)
    for group in build.GROUPS:
        isas = {name.removeprefix(f"{group}_") for name, source, _ in units if source == f"{group}_isa"}
        assert isas == set(build.GROUPS[group]) & set(build.variants(machine)) and "base" in isas


def test_imports_no_mindspore():
    code = (
        "import sys; sys.modules['mindspore'] = None\n"
        "import research.qwen.kernels.build, research.qwen.kernels.native, research.qwen.kernels.api"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
