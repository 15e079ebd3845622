"""What each cache format keeps of keys and values, by plain operators: float32 in, rounded float32 out."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from research.qwen.errors import KernelError


class KeepAll(nn.Cell):
    """float32: everything."""

    def construct(self, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        return x


class KeepBfloat16(nn.Cell):
    """bfloat16, rounded to nearest even."""

    def construct(self, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        return ops.cast(ops.cast(x, ms.bfloat16), ms.float32)


class KeepInt8(nn.Cell):
    """Symmetric int8, one scale per token and head: max|x| / 127; codes rounded to nearest even."""

    def __init__(self) -> None:
        super().__init__()
        self.most = ops.ReduceMax(keep_dims=True)
        self.round = ops.Rint()

    def construct(self, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        most = self.most(ops.abs(x), -1)
        some = most >= 1e-30  # below, all codes are 0
        safe = ops.select(some, most, ops.ones_like(most))
        kept = self.round(x * (127.0 / safe)) * (safe / 127.0)
        return kept * ops.cast(some, ms.float32)


class KeepPublished(nn.Cell):
    """The published int8 cache: one scale and zero point per sequence and head over all tokens of this pass, truncated.

    scale = (max - min) / 255; zero = -min / scale, not rounded; code = floor(clip(x / scale + zero, 0, 255)). The same
    in NumPy: quant.kv. Here sequences are not padded, so padding never widens a range as it does in a published batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = ops.ReduceMax(keep_dims=True), ops.ReduceMin(keep_dims=True)

    def construct(self, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        rows = ops.gather(x, pad, 0)  # (B, Q, heads, d); surplus places repeat a token of the same sequence
        low, high = self.low(rows, (1, 3)), self.high(rows, (1, 3))
        scale = (high - low) / 255.0
        safe = ops.select(scale > 0, scale, ops.ones_like(scale))
        zero = 0.0 - low / safe
        codes = ops.floor(ops.clamp(rows / safe + zero, 0.0, 255.0))
        kept = scale * (codes - zero)
        return ops.gather(kept.reshape((-1, x.shape[1], x.shape[2])), unpad, 0)


FORMATS = {
    "auto": KeepAll,
    "float32": KeepAll,
    "bfloat16": KeepBfloat16,
    "int8": KeepInt8,
    "int8-published": KeepPublished,
}


def keeper(fmt: str) -> nn.Cell:
    """Cell (x (T, heads, d), pad (B, Q), unpad (T,)) -> what the format keeps of x; KernelError for an unknown one."""
    if fmt not in FORMATS:
        raise KernelError(f"the reference backend keeps keys and values as {', '.join(FORMATS)}, not {fmt!r}")
    return FORMATS[fmt]()
