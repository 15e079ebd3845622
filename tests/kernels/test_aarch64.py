"""The kernels of aarch64, cross-compiled and run by qemu: the same tests, tolerances and invariants as on x86-64."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from research.qwen.kernels import build
from tests.kernels import test_cpu_kernels, test_quant_kernels
from tests.kernels.aarch64.emulated import EmulatedLibrary

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
pytestmark = [
    pytest.mark.mindspore,  # left out of the fast run: it compiles for some seconds
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library and the driver for aarch64."""
    folder = tmp_path_factory.mktemp("aarch64")
    library, driver = folder / "kernels.so", folder / "driver"
    build.build_library(shutil.which(COMPILER), "aarch64", library, build.cache_folder() / "objects")
    source = Path(__file__).parent / "aarch64" / "driver.cc"
    subprocess.run([COMPILER, "-std=c++17", "-O1", str(source), "-ldl", "-o", str(driver)], check=True)
    return library, driver


def start(built, isa="", cpu="max"):
    library, driver = built
    return EmulatedLibrary([EMULATOR, "-L", SYSROOT, "-cpu", cpu, str(driver)], library, isa)


@pytest.fixture(scope="module", params=sorted(build.ARM))
def native(request, built):
    library = start(built, request.param)
    assert library.isa == request.param
    library.set_threads(2)
    yield library
    library.close()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("processor, isa", [("cortex-a53", "base"), ("neoverse-n1", "dot"), ("max", "dot")])
def test_the_processor_decides(built, processor, isa):
    library = start(built, cpu=processor)
    assert library.isa == isa
    library.close()


def _tests_of_a_library(module):
    """Tests of another file that need nothing but a library, random numbers and their own parameters."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and "native" in inspect.signature(function).parameters:
            yield f"test_{module.__name__.rpartition('test_')[2]}_{name.removeprefix('test_')}", function


for _module in (test_cpu_kernels, test_quant_kernels):
    globals().update(_tests_of_a_library(_module))
