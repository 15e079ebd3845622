"""Quantised matrices on Ascend: MindSpore's WeightQuantBatchMatmul, which dequantises inside the product.

The operator computes ``x @ ((q + offset) * scale)`` with x, scale and offset in the compute dtype and q signed int8,
or int4 two to a byte. docs/ascend.md says which chips it is documented for and what of this is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from research.qwen.errors import KernelError
from research.qwen.kernels.ascend_cells import DTYPES, check_range, placeholder
from research.qwen.kernels.ascend_ops import FusedOps
from research.qwen.quant.schemes import PANEL, Codes, Scheme, check_packed, dequantize_packed, unpack

LARGEST = 65535  # rows and columns of a matrix the operator takes
ROWS_AT_ONCE = 256  # rows unpacked at a time: whole panels, and small enough for the processor's cache
WITHOUT = ("910a", "ascend910", "310b", "ascend310b")  # chips the operator is documented not to run on
ONLY_INT8_ROWS = ("310p", "ascend310p")  # chips it is documented for with int8 and one scale per row only


@dataclass(frozen=True)
class Operator:
    """How the operator is called for a matrix (n, k) of a scheme.

    ``group`` is its antiquant_group_size: 0 with one scale per row, which is also what a single group is called.
    """

    scheme: Scheme
    n: int
    k: int

    @property
    def group(self) -> int:
        """Inputs per scale, 0 if the row has one."""
        return self.scheme.group if self.scheme.group < self.k else 0

    @property
    def transposed(self) -> bool:
        """Whether the weight is (n, k): recommended for int8 with a scale per row; else it is (k, n)."""
        return self.scheme.bits == 8 and not self.group

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the stored bytes: two neighbouring outputs share one where codes have 4 bits."""
        if self.transposed:
            return self.n, self.k
        return self.k, self.n * self.scheme.bits // 8

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """(groups, n), or (n,) with one scale per row."""
        return (self.scheme.groups(self.k), self.n) if self.group else (self.n,)


def operator_for(scheme: Scheme, n: int, k: int) -> Operator | None:
    """The call for a matrix of that size; None if the operator does not take it."""
    if max(n, k) > LARGEST or (scheme.bits == 4 and n % 2):
        return None
    return Operator(scheme, n, k)


def check_operator(operator: Operator, soc: str) -> None:
    """KernelError if the chip is known and the operator is not documented for it with this scheme."""
    scheme = operator.scheme
    if soc in WITHOUT:
        raise KernelError(
            f"{soc} has no operator for quantised weights ({scheme}); on this chip use the plain checkpoint with "
            "dtype float16, or device cpu"
        )
    if soc in ONLY_INT8_ROWS and (scheme.bits != 8 or operator.group):
        raise KernelError(
            f"{soc} takes quantised weights as int8 with one scale per row only, not {scheme}; use int8, or the "
            "plain checkpoint with dtype float16, or device cpu"
        )


class QuantLinear(nn.Cell):
    """y = x W^T + b of a quantised W. Parameters: weight, scales, offsets (own zero points), order, bias.

    The bias is added outside: with bfloat16 the operator's kernel wants it in float32, its front end in bfloat16.
    """

    def __init__(self, fused: FusedOps, operator: Operator, ordered: bool, bias: bool, dtype: Any):
        super().__init__()
        rank = len(operator.scale_shape)
        kind = getattr(ms, fused.packed_int4) if operator.scheme.bits == 4 else ms.int8
        self.weight = placeholder("weight", 2, kind)
        self.scales = placeholder("scales", rank, dtype)
        self.offsets = placeholder("offsets", rank, dtype) if operator.scheme.zeros else None
        self.order = placeholder("order", 1, ms.int32) if ordered else None
        self.bias = placeholder("bias", 1, dtype) if bias else None
        self.matmul = fused.WeightQuantBatchMatmul(False, operator.transposed, operator.group)
        self.gather, self.add = ops.Gather(), ops.Add()

    def construct(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = self.gather(x, self.order, 1)
        y = self.matmul(x, self.weight, self.scales, self.offsets, None, None, None)
        return y if self.bias is None else self.add(y, self.bias)


def operands(arrays: Mapping[str, NDArray[Any]], operator: Operator, dtype: str) -> dict[str, NDArray[Any]]:
    """Packed arrays as the operator's: weight int8, scales and offsets in ``dtype``, order int32 if there is one.

    Int4 codes share a byte in pairs, the even output in the low half. Raises CheckpointError if an array is wrong
    or a scale does not fit float16.
    """
    scheme, wide = operator.scheme, DTYPES[dtype]
    weight = np.empty(operator.weight_shape, np.int8)
    scales = np.empty((scheme.groups(operator.k), operator.n), wide)
    offsets = np.empty(scales.shape, wide) if scheme.zeros else None
    for start, part in _blocks(arrays, scheme, operator.n, operator.k):
        stop = min(start + ROWS_AT_ONCE, operator.n)
        codes = unpack(part, scheme, stop - start, operator.k)
        if operator.transposed:
            weight[start:stop] = _signed(codes)
        elif scheme.bits == 8:
            weight[:, start:stop] = _signed(codes).T
        else:
            weight[:, start // 2 : stop // 2] = _pairs(codes)
        check_range(codes.scales, dtype, "scale")
        scales[:, start:stop] = codes.scales.T
        if offsets is not None and codes.zeros is not None:
            offsets[:, start:stop] = scheme.middle - codes.zeros.T.astype(np.int16)
    found: dict[str, NDArray[Any]] = {"weight": weight, "scales": scales.reshape(operator.scale_shape)}
    if offsets is not None:
        found["offsets"] = offsets.reshape(operator.scale_shape)
    if "order" in arrays:
        found["order"] = np.array(arrays["order"], np.int32)
    return found


def dequantised(
    arrays: Mapping[str, NDArray[Any]], scheme: Scheme, n: int, k: int, dtype: str
) -> NDArray[Any]:
    """The matrix (n, k) of packed arrays in ``dtype``, inputs in the model's order, made by blocks of rows."""
    matrix = np.empty((n, k), DTYPES[dtype])
    order = {"order": arrays["order"]} if "order" in arrays else {}
    for start, part in _blocks(arrays, scheme, n, k):
        rows = dequantize_packed({**part, **order}, scheme, min(ROWS_AT_ONCE, n - start), k)
        check_range(rows, dtype, "weight value")
        matrix[start : start + len(rows)] = rows
    return matrix


def _blocks(
    arrays: Mapping[str, NDArray[Any]], scheme: Scheme, n: int, k: int
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """First row and packed arrays of every block of rows, without the order."""
    check_packed(arrays, scheme, n, k)
    for start in range(0, n, ROWS_AT_ONCE):
        panels = slice(start // PANEL, -(-min(start + ROWS_AT_ONCE, n) // PANEL))
        yield start, {name: array[panels] for name, array in arrays.items() if name != "order"}


def _signed(codes: Codes) -> NDArray[np.int8]:
    """int8 codes with the zero point of a symmetric scheme at 0."""
    signed: NDArray[np.int8] = (codes.codes ^ 0x80).view(np.int8)
    return signed


def _pairs(codes: Codes) -> NDArray[np.int8]:
    """(n, k) int4 codes as (k, n / 2) bytes of two signed codes."""
    nibbles = np.ascontiguousarray((codes.codes ^ 8).T)
    pairs: NDArray[np.int8] = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8)
    return pairs
