"""What an installation carries: the compiled kernels in a wheel for this platform, or none where nothing compiles."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
ROOT = Path(__file__).resolve().parents[2]
LOAD = """
from research.qwen.errors import KernelError
from research.qwen.kernels import build
from research.qwen.kernels.native import NativeLibrary
try:
    path = build.library_path()
    print(NativeLibrary(path).isa, path)
except KernelError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a source distribution holds, without the demo model."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    skip = shutil.ignore_patterns("__pycache__", "demo", "lib", ".*")
    shutil.copytree(ROOT / "research", folder / "research", ignore=skip)
    return folder


def wheel(tree: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """Builds a wheel as pip does, in this environment: (wheel, what the build has printed)."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--verbose", "--no-deps", "--no-build-isolation"]
        + ["--no-index", "--disable-pip-version-check", "--wheel-dir", str(folder)],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made, done.stdout + done.stderr


def run_without_compiler(package: Path, folder: Path) -> str:
    """The first line LOAD prints with the package in front of all others and no compiler to be found."""
    environment = {"PATH": str(folder), "PYTHONPATH": str(package), "QWEN_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[0]


def test_a_wheel_carries_the_library(tree, tmp_path):
    made, printed = wheel(tree, tmp_path / "wheels")
    assert "compiled kernels: " in printed, printed
    assert made.stem.endswith(f"-py3-none-linux_{platform.machine()}")
    package = tmp_path / "package"
    with zipfile.ZipFile(made) as archive:
        archive.extractall(package)
    (library,) = package.rglob("*.so")
    assert library.parent == package / "research" / "qwen" / "kernels" / "lib"
    assert (package / "research/qwen/kernels/csrc/vec.h").is_file(), "so that it can be built anew"
    isa, path = run_without_compiler(package, tmp_path).split()
    assert Path(path) == library and isa
    with (package / "research/qwen/kernels/csrc/vec.h").open("a") as file:
        file.write("// changed\n")
    assert "install g++" in run_without_compiler(package, tmp_path), "not used for other sources"


@pytest.mark.parametrize("compiler", ["nowhere++", "false"], ids=["missing", "failing"])
def test_an_installation_without_a_working_compiler_succeeds(tree, tmp_path, compiler):
    made, printed = wheel(tree, tmp_path, CXX=compiler)
    assert "'cpu' are not compiled" in printed and compiler in printed
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    if compiler == "nowhere++":
        assert made.stem.endswith("-py3-none-any")


def test_an_editable_build_fills_the_cache_instead(tree, tmp_path):
    code = (
        "import setuptools, sys; sys.argv[1:] = ['editable_wheel', '--dist-dir', sys.argv[1]]; "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': 'x'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compiled kernels: " in done.stdout, done.stderr
    assert not list((tree / "research").rglob("*.so"))
