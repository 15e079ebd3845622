"""The kernels of aarch64, cross-compiled and run by qemu: the same tests, tolerances and invariants as on x86-64."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
from inspect import signature
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

from research.qwen.kernels import build
from research.qwen.kernels.native import NativeLibrary
from tests.kernels import quant_cases
from tests.kernels.aarch64.emulated import EmulatedLibrary, EmulatedQuantiser
from tests.quant import test_native

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
LIBRARY_TEST = re.compile(r"^def test_\w+\(native\b", re.MULTILINE)
LEFT_OUT = {"test_calls_from_two_threads_at_once"}  # the emulated process takes one call at a time
FEWER = {"test_long_contexts": ("threads", [1, 3])}  # takes a second or more each time
ISAS = sorted(build.ARM)
DOT = {"test_quant_kernels", "test_layer_kernels"}  # files with kernels that dotprod changes
FIXTURE = type(pytest.fixture(lambda: None))
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


def on(isas):
    """Mark of a test or class: with the library on these instruction sets."""
    return pytest.mark.parametrize("native", isas, indirect=True, scope="module")


@pytest.fixture(scope="module")
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


def _fewer(function):
    """The same test with the values that FEWER gives for a parameter."""
    if function.__name__ not in FEWER:
        return function
    parameter = FEWER[function.__name__]
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.pytestmark = [
        pytest.mark.parametrize(*parameter).mark if mark.args[0] == parameter[0] else mark
        for mark in function.pytestmark
    ]
    return copy


def _classes():
    """A class for each file beside this one with tests of a library, and the fixtures of these files."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.samefile(__file__) or not LIBRARY_TEST.search(path.read_text(encoding="utf-8")):
            continue
        members = {}
        for name, value in vars(importlib.import_module(f"{__package__}.{path.stem}")).items():
            if isinstance(value, FIXTURE) and name not in ("native", "rng"):
                assert name not in globals(), f"{path}: a fixture of another file has this name, too: {name}"
                yield name, value
            elif (
                name.startswith("test_") and name not in LEFT_OUT and "native" in signature(value).parameters
            ):
                members[name] = staticmethod(_fewer(value))
        name = "".join(word.capitalize() for word in path.stem.split("_"))
        yield name, on(ISAS if path.stem in DOT else ("base",))(type(name, (), members))


globals().update(_classes())


def test_what_is_run_on_one_instruction_set_has_no_other():
    assert [group for group, isas in build.GROUPS.items() if "dot" in isas] == ["quant"]


@pytest.fixture(scope="module")
def here():
    """The library of this machine, where it too has a fused multiply-add."""
    library = NativeLibrary(build.library_path())
    if library.isa == "base" and platform.machine() != "aarch64":
        pytest.skip("this processor rounds twice where aarch64 rounds once")
    library.set_threads(2)
    return library


@on(ISAS)
@pytest.mark.parametrize("text", quant_cases.SCHEMES)
def test_integer_weights_give_the_bits_of_this_machine(native, here, rng, text):
    one, two = (quant_cases.matrix(rng, text, 75, 330) for _ in range(2))
    ordered = quant_cases.matrix(rng, text, 50, 500, order=True)
    for rows in (1, 2, 3, 6, 21):
        x, longer = (quant_cases.activations(rng, rows, k) for k in (330, 500))
        for name in ("QwenTestQuantLinear", "QwenTestFloatLinear"):
            for case in ((x, one), (longer, ordered)):
                got, wanted = (quant_cases.run(library, *case, name=name) for library in (native, here))
                np.testing.assert_array_equal(got, wanted, err_msg=f"{name}, {rows} rows")
        got, wanted = (quant_cases.gated(library, x / 100, one, two) for library in (native, here))
        np.testing.assert_array_equal(got, wanted, err_msg=f"gated, {rows} rows")


@on(("base",))
@pytest.mark.parametrize("kind", ["plain", "positive"])
@pytest.mark.parametrize("text", test_native.TEXTS)
def test_quantiser(native, text, kind):
    test_native.test_the_same_bits(EmulatedQuantiser(native), text, kind)


@on(("base",))
@pytest.mark.parametrize("text", test_native.TEXTS)
def test_refusals_of_the_quantiser(native, text):
    test_native.test_the_same_refusals(EmulatedQuantiser(native), text)
