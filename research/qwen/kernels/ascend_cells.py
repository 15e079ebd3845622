"""Cells of the Ascend backend with plain weights, and how such weights get their dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.ascend_ops import FusedOps

DTYPES = {
    "float16": np.float16,
    "bfloat16": bfloat16,
    "float32": np.float32,
}  # float32: only with stand-in operators
ROWS_AT_ONCE = 1 << 24  # elements converted at a time, so that a large matrix needs no second full copy


def placeholder(name: str, rank: int, dtype: Any) -> Parameter:
    """A parameter whose data is set later; the loader replaces shape and memory."""
    return Parameter(Tensor(np.zeros((1,) * rank), dtype), name=name, requires_grad=False)


class Linear(nn.Cell):
    """y = x W^T + b; MindSpore merges the product and the sum into one kernel."""

    def __init__(self, bias: bool, dtype: Any):
        super().__init__()
        self.weight = placeholder("weight", 2, dtype)
        self.bias = placeholder("bias", 1, dtype) if bias else None
        self.matmul = ops.MatMul(transpose_b=True)
        self.add = ops.Add()

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(x, self.weight)
        return y if self.bias is None else self.add(y, self.bias)


class Embedding(nn.Cell):
    """Rows of a table."""

    def __init__(self, dtype: Any):
        super().__init__()
        self.weight = placeholder("weight", 2, dtype)
        self.gather = ops.Gather()

    def construct(self, ids: Tensor) -> Tensor:
        return self.gather(self.weight, ids, 0)


class RMSNorm(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) * weight; the fused kernel keeps the statistics in float32."""

    def __init__(self, fused: FusedOps, eps: float, dtype: Any):
        super().__init__()
        self.weight = placeholder("weight", 1, dtype)
        self.norm = fused.RmsNorm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight)[0]


class SwiGLU(nn.Cell):
    """a * silu(b). The fused kernel activates the first half of its input, so b goes first."""

    def __init__(self, fused: FusedOps):
        super().__init__()
        self.cat = ops.Concat(-1)
        self.fused = fused.Swiglu()

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fused(self.cat((b, a)), -1)


def converted(array: NDArray[Any], fmt: str, dtype: str) -> NDArray[Any]:
    """``array`` (stored as ``fmt``) in another dtype, a slice at a time.

    Raises CheckpointError if a value does not fit float16.
    """
    source = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(source.shape, DTYPES[dtype])
    for start in range(0, source.size, ROWS_AT_ONCE):
        part = widen(source[start : start + ROWS_AT_ONCE], fmt)
        check_range(part, dtype, "weight value")
        result[start : start + ROWS_AT_ONCE] = part.astype(result.dtype)
    return result.reshape(array.shape)


def check_range(values: NDArray[Any], dtype: str, what: str) -> None:
    """CheckpointError if float16 is asked for and cannot hold a value."""
    if dtype != "float16" or not values.size:
        return
    largest = float(np.max(np.abs(values)))
    if not largest < 65520.0:  # rounds to infinity; a NaN is refused too
        raise CheckpointError(
            f"{what} {largest:g} does not fit float16 (largest 65504); use dtype bfloat16 or device cpu"
        )
