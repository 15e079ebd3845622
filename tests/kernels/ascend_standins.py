"""CPU stand-ins for the seven fused Ascend operators: plain operators, written from the public contract.

They take the real constructor arguments and inputs in the real order, so a model graph built with them is the
Ascend graph but for the kernels. They compute in float32, whatever their dtype. What they get is checked:
dtypes and ranks when a graph is compiled, and with ``eager=True`` (PYNATIVE) also every dimension and the
values that the contract limits.
"""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.qwen.kernels.ascend_ops import FusedOps

FORBIDDEN = -1e30


def standins(dtype: str = "float32", eager: bool = False) -> FusedOps:
    """The namespace for ``ascend.build(ops=...)``; ``dtype`` is the compute dtype C of the contract."""
    make = functools.partial(functools.partial, dtype=getattr(ms, dtype), eager=eager)
    return FusedOps(
        RmsNorm=make(RmsNorm),
        Swiglu=make(Swiglu),
        ApplyRotaryPosEmb=make(ApplyRotaryPosEmb),
        ReshapeAndCache=make(ReshapeAndCache),
        FlashAttentionScore=make(FlashAttentionScore),
        PagedAttention=make(PagedAttention),
        WeightQuantBatchMatmul=make(WeightQuantBatchMatmul),
        packed_int4="int8",  # CPU has no operator that takes int4; the bytes are the same
    )


class StandIn(nn.Cell):
    """Checks shared by all stand-ins."""

    def __init__(self, dtype, eager):
        super().__init__()
        self.compute, self.eager = dtype, eager

    def expect(self, tensor, rank, dtype):
        """Contract of one input that is known when the graph is compiled."""
        if tensor.ndim != rank:
            raise ValueError("contract: an input has the wrong rank")
        if tensor.dtype != dtype:
            raise TypeError("contract: an input has the wrong dtype")

    def widened(self, tensor):
        """The tensor in float32, in which everything is computed."""
        return tensor.astype(ms.float32)


def demand(condition: bool, what: str) -> None:
    """Contract of the dimensions and values, eager only."""
    if not condition:
        raise ValueError(f"contract: {what}")


class RmsNorm(StandIn):
    """(x, gamma) -> (y, rstd), statistics in float32."""

    def __init__(self, epsilon=1e-6, *, dtype, eager):
        super().__init__(dtype, eager)
        self.epsilon = epsilon

    def construct(self, x, gamma):
        self.expect(x, 2, self.compute)
        self.expect(gamma, 1, self.compute)
        if self.eager:
            demand(x.shape[-1:] == gamma.shape, "gamma is as wide as x")
        wide = self.widened(x)
        rstd = ops.rsqrt(ops.ReduceMean(keep_dims=True)(wide * wide, -1) + self.epsilon)
        return (wide * rstd * self.widened(gamma)).astype(self.compute), rstd


class Swiglu(StandIn):
    """silu(first half) * second half along ``dim``."""

    def __init__(self, *, dtype, eager):
        super().__init__(dtype, eager)

    def construct(self, x, dim=-1):
        self.expect(x, 2, self.compute)
        first, second = ops.Split(dim, 2)(self.widened(x))
        return (first * ops.sigmoid(first) * second).astype(self.compute)


class ApplyRotaryPosEmb(StandIn):
    """cos_format 2: one row of cos and sin per token, halves layout."""

    def __init__(self, cos_format=0, *, dtype, eager):
        super().__init__(dtype, eager)
        demand(cos_format == 2, "halves layout with a row per token is cos_format 2")

    def turn(self, x, cos, sin):
        dim = cos.shape[-1]
        heads = self.widened(x).reshape((-1, x.shape[-1] // dim, dim))
        cos, sin = self.widened(cos), self.widened(sin)
        first, second = ops.Split(-1, 2)(heads)
        rotated = heads * cos.expand_dims(1) + ops.cat((-second, first), -1) * sin.expand_dims(1)
        return rotated.reshape((-1, x.shape[-1])).astype(self.compute)

    def construct(self, query, key, cos, sin, position_ids):
        self.expect(query, 2, self.compute)
        self.expect(key, 2, self.compute)
        self.expect(cos, 2, self.compute)
        self.expect(sin, 2, self.compute)
        self.expect(position_ids, 1, ms.int32)
        if self.eager:
            tokens = query.shape[0]
            demand(cos.shape == sin.shape and cos.shape[0] == tokens, "a row of cos and sin per token")
            demand(position_ids.shape == (tokens,), "a position per token")
            table, half = cos.asnumpy(), cos.shape[1] // 2
            demand(np.array_equal(table[:, :half], table[:, half:]), "both halves of a row of cos are equal")
        return self.turn(query, cos, sin), self.turn(key, cos, sin)


class ReshapeAndCache(StandIn):
    """Writes token t into slot slot_mapping[t] of both caches, in place."""

    def __init__(self, *, dtype, eager):
        super().__init__(dtype, eager)
        self.write = ops.ScatterNdUpdate()

    def construct(self, key, value, key_cache, value_cache, slot_mapping):
        self.expect(key, 2, self.compute)
        self.expect(value, 2, self.compute)
        self.expect(slot_mapping, 1, ms.int32)
        if key_cache.dtype != self.compute or value_cache.dtype != self.compute:
            raise TypeError("contract: a cache has the wrong dtype")
        if self.eager:
            self.demands(key, value, key_cache, value_cache, slot_mapping)
        block_size, row = key_cache.shape[1], key_cache.shape[2:]
        places = ops.stack((slot_mapping // block_size, slot_mapping % block_size), 1)
        written = self.write(key_cache, places, key.reshape((-1, *row)))
        written = ops.depend(value, written)
        self.write(value_cache, places, written.reshape((-1, *row)))
        return key

    def demands(self, key, value, key_cache, value_cache, slot_mapping):
        slots = slot_mapping.asnumpy()
        demand(key.shape == value.shape, "as many keys as values")
        demand(slots.shape == key.shape[:1], "a slot per token")
        demand(len(set(slots.tolist())) == len(slots), "no slot is written twice")
        demand(
            slots.min() >= 0 and slots.max() < key_cache.shape[0] * key_cache.shape[1], "slots in the cache"
        )
        demand(key_cache.shape == value_cache.shape, "caches of one shape")
        demand(int(np.prod(key_cache.shape[2:])) == key.shape[1], "the cache holds a whole token")


class FlashAttentionScore(StandIn):
    """Layout TH, sparse_mode 0 with the (128, 128) triangle: causal attention inside each sequence."""

    def __init__(
        self,
        head_num,
        keep_prob=1.0,
        scale_value=1.0,
        pre_tokens=2147483647,
        next_tokens=2147483647,
        inner_precise=0,
        input_layout="BSH",
        sparse_mode=0,
        *,
        dtype,
        eager,
    ):
        super().__init__(dtype, eager)
        demand(
            input_layout == "TH" and sparse_mode == 0, "the compressed triangle goes with TH, sparse_mode 0"
        )
        demand(keep_prob == 1.0 and inner_precise == 0, "no dropout; inner_precise is reserved")
        demand(pre_tokens == 2147483647 and next_tokens == 0, "the whole past and nothing of the future")
        self.heads, self.scale = head_num, scale_value

    def construct(
        self,
        query,
        key,
        value,
        real_shift=None,
        drop_mask=None,
        padding_mask=None,
        attn_mask=None,
        prefix=None,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
    ):
        if real_shift is not None or drop_mask is not None or padding_mask is not None or prefix is not None:
            raise ValueError("contract: not used in layout TH")
        self.expect(query, 2, self.compute)
        self.expect(key, 2, self.compute)
        self.expect(value, 2, self.compute)
        self.expect(attn_mask, 2, self.compute)
        if attn_mask.shape != (128, 128):
            raise ValueError("contract: the compressed mask is (128, 128)")
        self.expect(actual_seq_qlen, 1, ms.int32)
        self.expect(actual_seq_kvlen, 1, ms.int32)
        if self.eager:
            lengths = actual_seq_qlen.asnumpy()
            demand(query.shape == key.shape == value.shape, "as many queries as keys and values")
            demand(
                int(lengths.sum()) == query.shape[0] and lengths.min() > 0, "lengths, not their running sum"
            )
            demand(np.array_equal(lengths, actual_seq_kvlen.asnumpy()), "a fresh prompt has no older keys")
        row, local = owners(query, actual_seq_qlen)
        same = ops.equal(row.expand_dims(1), row.expand_dims(0))
        tile = ops.gather(ops.gather(self.widened(attn_mask), local % 128, 0), local % 128, 1)  # (T, T)
        here, there = (local // 128).expand_dims(1), (local // 128).expand_dims(0)
        open_tile = ops.logical_or(ops.less(there, here), ops.equal(tile, 0))
        visible = ops.logical_and(same, ops.logical_and(ops.less_equal(there, here), open_tile))
        q = split_heads(self.widened(query), self.heads)  # (heads, T, d)
        k = split_heads(self.widened(key), self.heads)
        v = split_heads(self.widened(value), self.heads)
        scores = ops.matmul(q, k.transpose((0, 2, 1))) * self.scale
        scores = ops.select(visible.broadcast_to(scores.shape), scores, ops.full_like(scores, FORBIDDEN))
        mixed = ops.matmul(ops.softmax(scores, -1), v)
        out = mixed.transpose((1, 0, 2)).reshape((-1, query.shape[-1]))
        return scores, scores, scores, out.astype(self.compute)


class PagedAttention(StandIn):
    """Queries of several sequences over their blocks: keys 0 .. context_lens - 1, attn_mask added."""

    def __init__(self, head_num, scale_value, kv_head_num, *, dtype, eager):
        super().__init__(dtype, eager)
        demand(head_num == kv_head_num, "every query head has its key head")
        self.heads, self.scale = head_num, scale_value

    def construct(
        self,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        antiquant_scale=None,
        antiquant_offset=None,
        attn_mask=None,
        q_seq_lens=None,
    ):
        if antiquant_scale is not None or antiquant_offset is not None:
            raise ValueError("contract: only for quantised caches")
        self.expect(query, 2, self.compute)
        self.expect(block_tables, 2, ms.int32)
        self.expect(context_lens, 1, ms.int32)
        self.expect(attn_mask, 2, self.compute)
        self.expect(q_seq_lens, 1, ms.int32)
        if self.eager:
            self.demands(query, key_cache, block_tables, context_lens, attn_mask, q_seq_lens)
        row, _ = owners(query, q_seq_lens)
        dim = query.shape[-1] // self.heads
        keys = self.pages(key_cache, block_tables, dim)  # (B, keys, heads, d)
        values = self.pages(value_cache, block_tables, dim)
        in_context = ops.less(places(attn_mask.shape[1:]).expand_dims(0), context_lens.expand_dims(1))
        k = ops.gather(keys, row, 0).transpose((0, 2, 1, 3))  # (T, heads, keys, d)
        v = ops.gather(values, row, 0).transpose((0, 2, 1, 3))
        q = self.widened(query).reshape((-1, self.heads, 1, dim))
        added = self.widened(attn_mask).expand_dims(1).expand_dims(1)
        scores = ops.matmul(q, k.transpose((0, 1, 3, 2))) * self.scale + added
        visible = ops.gather(in_context, row, 0).expand_dims(1).expand_dims(1).broadcast_to(scores.shape)
        scores = ops.select(visible, scores, ops.full_like(scores, FORBIDDEN))
        return ops.matmul(ops.softmax(scores, -1), v).reshape((-1, query.shape[-1])).astype(self.compute)

    def pages(self, cache, tables, dim):
        pages = self.widened(ops.gather(cache, tables, 0))
        return pages.reshape((tables.shape[0], -1, self.heads, dim))

    def demands(self, query, cache, tables, context_lens, mask, q_seq_lens):
        contexts, lengths = context_lens.asnumpy(), q_seq_lens.asnumpy()
        block_size = cache.shape[1]
        demand(len(tables) == len(contexts) == len(lengths), "one table, context and length per sequence")
        demand(int(lengths.sum()) == query.shape[0] and lengths.min() > 0, "q_seq_lens cover the tokens")
        demand(bool((lengths <= contexts).all()), "context_lens count the tokens of this pass as well")
        demand(bool((contexts <= tables.shape[1] * block_size).all()), "the tables hold every context")
        demand(tables.min() >= 0 and tables.max() < cache.shape[0], "block ids in the cache")
        demand(mask.shape == (query.shape[0], tables.shape[1] * block_size), "a mask column per cached place")


class WeightQuantBatchMatmul(StandIn):
    """x @ ((weight + offset) * scale): weight (k, n) int8, (n, k) if transposed, or (k, n / 2) pairs of int4."""

    def __init__(self, transpose_x=False, transpose_weight=False, antiquant_group_size=0, *, dtype, eager):
        super().__init__(dtype, eager)
        demand(not transpose_x, "x is (T, k)")
        demand(antiquant_group_size % 32 == 0, "groups are multiples of 32")
        self.transposed, self.group = transpose_weight, antiquant_group_size

    def construct(
        self,
        x,
        weight,
        antiquant_scale,
        antiquant_offset=None,
        quant_scale=None,
        quant_offset=None,
        bias=None,
    ):
        if quant_scale is not None or quant_offset is not None or bias is not None:
            raise ValueError("contract: the output is not quantised and the bias is added outside")
        self.expect(x, 2, self.compute)
        self.expect(weight, 2, ms.int8)
        self.expect(antiquant_scale, 2 if self.group else 1, self.compute)
        k, n = x.shape[1], antiquant_scale.shape[-1]
        if k > 65535 or n > 65535:
            raise ValueError("contract: k and n are at most 65535")
        if self.group and (self.group >= k or antiquant_scale.shape[0] != -(-k // self.group)):
            raise ValueError("contract: a group is below k, and scale has a row per group")
        levels = self.levels(weight, k, n)
        if antiquant_offset is not None:
            self.expect(antiquant_offset, antiquant_scale.ndim, self.compute)
            if antiquant_offset.shape != antiquant_scale.shape:
                raise ValueError("contract: offset has the shape of scale")
            levels = levels + self.along(antiquant_offset, k, n)
        weight = levels * self.along(antiquant_scale, k, n)
        return ops.matmul(self.widened(x), weight).astype(self.compute)

    def levels(self, weight, k, n):
        """Signed codes (k, n) in float32."""
        wide = self.widened(weight)
        if self.transposed:
            if weight.shape != (n, k):
                raise ValueError("contract: a transposed weight is (n, k)")
            return wide.transpose((1, 0))
        if weight.shape == (k, n):
            return wide
        if weight.shape[0] != k or 2 * weight.shape[1] != n:
            raise ValueError("contract: weight is (k, n), or (k, n / 2) with two codes in a byte")
        byte = wide + 256.0 * ops.less(wide, 0.0).astype(ms.float32)
        high = ops.floor(byte / 16.0)
        pair = ops.stack((byte - 16.0 * high, high), -1)
        return (pair - 16.0 * ops.greater(pair, 7.0).astype(ms.float32)).reshape((k, n))

    def along(self, values, k, n):
        """Values per group for every input: (k, n), or (1, n) with one group."""
        wide = self.widened(values)
        if not self.group:
            return wide.reshape((1, n))
        groups = values.shape[0]
        spread = wide.expand_dims(1).broadcast_to((groups, self.group, n)).reshape((groups * self.group, n))
        return spread[:k]


def places(shape):
    """0 .. n - 1 for a dimension known only at run time."""
    return ops.cumsum(ops.ones(shape, ms.float32), 0).astype(ms.int32) - 1


def owners(query, lengths):
    """(T,) sequence of each token and (T,) its index inside the sequence's tokens of this pass."""
    token = places(query.shape[:1])
    ends = ops.cumsum(lengths.astype(ms.float32), 0).astype(ms.int32)
    row = ops.greater_equal(token.expand_dims(1), ends.expand_dims(0)).astype(ms.int32).sum(1)
    return row, token - ops.gather(ends - lengths, row, 0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(T, H) -> (heads, T, d)."""
    return x.reshape((-1, heads, x.shape[-1] // heads)).transpose((1, 0, 2))
