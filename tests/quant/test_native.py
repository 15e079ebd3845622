"""The C++ quantiser gives the bits of NumPy's, on every instruction set this processor has."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from research.qwen.errors import CheckpointError, KernelError
from research.qwen.kernels.build import library_path
from research.qwen.kernels.native_quantize import NativeQuantiser
from research.qwen.quant.schemes import Scheme, quantize_packed

# Marked because a first run compiles the library for some seconds; MindSpore itself is not imported here.
pytestmark = pytest.mark.mindspore
# The other instruction sets use these tables too.
ISAS = ("avx512", "avx2", "base")
TEXTS = "int8 int4 int4-g64 int4-asym int4-g64-asym int8-g128 int8-g64 int8-asym int8-g64-asym".split()


@pytest.fixture(scope="module", params=ISAS)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeQuantiser:
    copy = tmp_path_factory.mktemp("isa") / f"{request.param}.so"
    shutil.copy(library_path(), copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_ISA", request.param)
        try:
            return NativeQuantiser(2, copy)
        except KernelError as error:
            pytest.skip(str(error))


def weights(n: int, k: int, kind: str) -> np.ndarray:
    """Matrices with heavy tails, zeros, a row of zeros; of several sizes."""
    rng = np.random.default_rng(n * k)
    w = rng.standard_t(3, (n, k)) * {"plain": 0.02, "tiny": 1e-7, "large": 1e3, "positive": 3e-5}[kind]
    if kind == "positive":
        w = np.abs(w)
    w[rng.random((n, k)) < 0.05] = 0
    w[n // 2] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("kind", ["plain", "tiny", "large", "positive"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_same_bits(native: NativeQuantiser, text: str, kind: str) -> None:
    scheme = Scheme.parse(text)
    for n, k in ((37, 300), (64, 256), (2, 5), (50, 513)):
        w = weights(n, k, kind)
        stored = [w, (w.view(np.uint32) >> 16).astype(np.uint16)]
        stored += [w.astype(np.float16)] if kind != "large" else []
        for rows in stored:
            wanted = quantize_packed([rows], scheme, n, k)
            found = quantize_packed([rows[:16], rows[16:]], scheme, n, k, native)
            for name in wanted:
                assert np.array_equal(found[name].view(np.uint8), wanted[name].view(np.uint8)), (
                    name,
                    rows.dtype,
                )


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_refusals(native: NativeQuantiser, text: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        w = weights(20, 130, "plain")
        w[3, 129] = value
        with pytest.raises(CheckpointError, match="not a finite number"):
            quantize_packed([w], Scheme.parse(text), 20, 130, native)
    if text != "int8":
        with pytest.raises(CheckpointError, match="use int8"):
            quantize_packed([weights(20, 130, "large") * 1e6], Scheme.parse(text), 20, 130, native)
