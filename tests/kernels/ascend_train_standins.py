"""Stand-ins for the fused operators as training uses them: FlashAttentionScore over whole rows in layout BNSD.

Written from the operator's public description; MindSpore derives the backward pass of plain operators, so gradients
pass through. Computes in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import mindspore as ms
from mindspore import ops

from research.qwen.kernels.ascend_ops import FusedOps
from tests.kernels.ascend_standins import FORBIDDEN, StandIn, demand, standins

ANY = 2147483647
MODES = {0: (ANY, ANY), 2: (ANY, 0)}  # sparse_mode -> pre_tokens, next_tokens


def train_standins(dtype: str = "float32") -> FusedOps:
    """The namespace for ``Spec(fused=...)``; ``dtype`` is the compute dtype."""
    flash = functools.partial(RowAttention, dtype=getattr(ms, dtype), eager=False)
    return dataclasses.replace(standins(dtype), FlashAttentionScore=flash)


class RowAttention(StandIn):
    """q, k, v (B, N, S, D). sparse_mode 0: mask (B, 1, S, S) uint8, 1 = discarded. 2: causal from the upper left, told
    by the (2048, 2048) triangle, whatever S is."""

    def __init__(
        self,
        head_num,
        keep_prob=1.0,
        scale_value=1.0,
        pre_tokens=ANY,
        next_tokens=ANY,
        inner_precise=0,
        input_layout="BSH",
        sparse_mode=0,
        *,
        dtype,
        eager,
    ):
        super().__init__(dtype, eager)
        demand(input_layout == "BNSD" and keep_prob == 1.0 and inner_precise == 0, "BNSD without dropout")
        demand(MODES.get(sparse_mode) == (pre_tokens, next_tokens), "a full mask, or the causal triangle")
        self.heads, self.scale, self.mode = head_num, scale_value, sparse_mode

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
            raise ValueError("contract: not used here")
        if actual_seq_qlen is not None or actual_seq_kvlen is not None:
            raise ValueError("contract: lengths belong to layout TND")
        for tensor in (query, key, value):
            self.expect(tensor, 4, self.compute)
        if query.shape[1] != self.heads or query.shape != key.shape or key.shape != value.shape:
            raise ValueError("contract: q, k and v are (B, N, S, D)")
        size = query.shape[2]
        if self.mode == 2:
            self.expect(attn_mask, 2, ms.uint8)
            if attn_mask.shape != (2048, 2048):
                raise ValueError("contract: the triangle is (2048, 2048)")
            hidden = attn_mask[:size, :size].expand_dims(0).expand_dims(0)
        else:
            self.expect(attn_mask, 4, ms.uint8)
            if attn_mask.shape != (query.shape[0], 1, size, size):
                raise ValueError("contract: the mask is (B, 1, S, S)")
            hidden = attn_mask
        scores = ops.matmul(self.widened(query), self.widened(key).transpose((0, 1, 3, 2))) * self.scale
        visible = ops.equal(hidden.astype(ms.float32), 0.0).broadcast_to(scores.shape)
        scores = ops.select(visible, scores, ops.full_like(scores, FORBIDDEN))
        mixed = ops.matmul(ops.softmax(scores, -1), self.widened(value))
        return scores, scores, scores, mixed.astype(self.compute)
