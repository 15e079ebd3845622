"""Dropout in front of an adapter, in the Ascend step graph: plain operators on the words of ``dropout_words``.

No generator keeps a state, so a layer that is computed again, or a run that is resumed, has the same mask.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from research.qwen.kernels.dropout_words import (
    BITS,
    CHANCES,
    SHIFT,
    WIDTH,
    chances,
    input_words,
    matrix_words,
)


class Drop(nn.Cell):
    """(x (T, n_in), noise (T, 4) int32) -> (x with zeros where an input is dropped, growth of the rest (T, 1) float32).

    The growth is 1 / kept share, or 1 for tokens whose inputs all stay (evaluation); it is left to the caller, who has
    (T, rank) numbers to multiply where there are (T, n_in) here. ``place``: layer and number of the matrix in it;
    ``ways``: shards of the tokens and of the inputs.
    """

    def __init__(self, n_in: int, place: tuple[int, int], rate: float, seed: int, ways: tuple[int, int]):
        super().__init__()
        rows, ins = ways
        tall, wide, whole = (rows, 1), (1, ins), (rows, ins)
        self.own = Tensor(matrix_words(seed, *place))
        self.a, self.b, self.c = (Tensor(row.reshape(1, -1)) for row in input_words(seed, n_in))
        self.bits, self.most = Tensor([[BITS]], ms.int32), Tensor([[CHANCES << SHIFT]], ms.int32)
        self.more = CHANCES / chances(rate) - 1.0
        self.change = ops.BitwiseXor().shard((tall, (1, 1)))
        self.split = ops.Split(1, WIDTH).shard((tall,))
        self.meet = ops.BitwiseXor().shard((tall, wide))
        self.product, self.mix = ops.Mul().shard((whole, whole)), ops.BitwiseXor().shard((whole, whole))
        self.take = ops.BitwiseAnd().shard((whole, (1, 1)))
        self.below = ops.Less().shard((whole, tall))
        self.below_all = ops.Less().shard((tall, (1, 1)))
        self.cast, self.cast_tall = ops.Cast().shard((whole,)), ops.Cast().shard((tall,))
        self.times = ops.Mul().shard((whole, whole))
        self.scale, self.plus = ops.Mul().shard((tall, ())), ops.Add().shard((tall, ()))

    def construct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, limit = self.split(self.change(noise, self.own))
        mixed = self.product(self.meet(a, self.a), self.meet(b, self.b))
        mixed = self.take(self.mix(mixed, self.meet(c, self.c)), self.bits)
        kept = ops.stop_gradient(self.cast(self.below(mixed, limit), x.dtype))
        some = self.cast_tall(self.below_all(limit, self.most), ms.float32)
        return self.times(x, kept), ops.stop_gradient(self.plus(self.scale(some, self.more), 1.0))
