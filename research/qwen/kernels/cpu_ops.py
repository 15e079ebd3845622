"""Registration of the C++ kernels as MindSpore operators."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from research.qwen.errors import KernelError

NAMES = 16  # QwenPacked0 .. 15 and so on: see csrc/ops_layer.cc
F32, I32, I64 = DataType.F32_Default, DataType.I32_Default, DataType.I64_Default
TYPES: dict[Any, Any] = {
    np.float32: F32,
    np.int32: I32,
    np.uint16: DataType.U16_Default,
    np.float16: DataType.F16_Default,
    np.uint8: DataType.U8_Default,
    np.int8: DataType.I8_Default,
}


def operator(library: Path, name: str, *inputs: Any, outputs: int = 1) -> ops.Custom:
    """The C++ function ``name`` with inputs of these registration types and float32 outputs."""
    registration = CustomRegOp()  # without it MindSpore dies with "The pointer[value] is null"
    for i in range(len(inputs)):
        registration = registration.input(i, f"x{i}")
    for i in range(outputs):
        registration = registration.output(i, "y" if outputs == 1 else f"y{i}")
    info = registration.dtype_format(*inputs, *[F32] * outputs).target("CPU").get_op_info()
    kinds = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    return ops.Custom(f"{library}:{name}", out_shape=None, out_dtype=kinds, func_type="aot", reg_info=info)


def numbered_operator(library: Path, family: str, *inputs: Any) -> ops.Custom:
    """One of the names a family has in the library: MindSpore keeps a single registration a name, with its inputs.

    KernelError once a process has used every name with a different set of input types.
    """
    number = _number(family, inputs)
    if number >= NAMES:
        raise KernelError(
            f"more than {NAMES} mixes of weight formats in one process ({family}); start a new process"
        )
    return operator(library, f"{family}{number}", *inputs)


@cache
def _number(family: str, inputs: tuple[Any, ...]) -> int:
    return next(_numbers(family))


@cache
def _numbers(family: str) -> Iterator[int]:
    return itertools.count()
