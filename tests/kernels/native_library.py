"""The kernels with one instruction set at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import KernelError
from research.qwen.kernels.build import library_path
from research.qwen.kernels.native import ISAS, NativeLibrary


def load(isa: str, folder: Path) -> NativeLibrary:
    """A copy of the library, which is one of its own to the loader; KernelError if the processor lacks ``isa``."""
    copy = folder / f"{isa}.so"
    shutil.copy(library_path(), copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_ISA", isa)
        library = NativeLibrary(copy)
    assert library.isa == isa
    library.set_threads(2)
    return library


def native_on(isas: Iterable[str] = ISAS) -> Any:
    """A fixture: the library with each of these instruction sets that this processor has."""

    @pytest.fixture(scope="module", params=list(isas))
    def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
        try:
            return load(request.param, tmp_path_factory.mktemp("isa"))
        except KernelError as error:
            pytest.skip(str(error))

    return native


def unaligned(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy of an array at an address that is ``offset`` bytes past a multiple of 64."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    first = -raw.ctypes.data % 64 + offset
    view = raw[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view
