"""The fused Ascend operators this project calls, as a namespace that tests can replace.

Each field makes one operator with MindSpore's own constructor arguments; what is called later has MindSpore's
argument order. What is said about the operators comes from MindSpore 2.9's docstrings and operator tests and
from how MindFormers 1.9 calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OpFactory = Callable[..., Any]


@dataclass(frozen=True)
class FusedOps:
    """Constructors of the seven fused operators. T tokens, H = heads * d, B sequences, C float16 or bfloat16.

    RmsNorm(epsilon): x (T, H) C, gamma (H,) C -> y (T, H) C, rstd.
    Swiglu(): x (T, 2 W) C, dim -> silu(first half) * second half, (T, W) C.
    ApplyRotaryPosEmb(cos_format): q, k (T, H) C, cos, sin (T, d) C, position_ids (T,) int32 -> q, k rotated.
        cos_format 2: one row of cos and sin per token, element i of the head pairs with i + d / 2.
    ReshapeAndCache(): k, v (T, H) C, key_cache, value_cache (both (blocks, block_size, heads, d) C),
        slot_mapping (T,) int32; writes into the caches and returns a tensor like k.
    FlashAttentionScore(head_num, scale_value, pre_tokens, next_tokens, inner_precise, input_layout,
        sparse_mode): q, k, v (T, H) C, real_shift, drop_mask, padding_mask, attn_mask, prefix,
        actual_seq_qlen, actual_seq_kvlen -> (softmax_max, softmax_sum, softmax_out, attention_out (T, H) C).
        Layout TH: attn_mask is one (128, 128) triangle, both lengths are (B,) int32, one per sequence.
    PagedAttention(head_num, scale_value, kv_head_num): q (T, H) C, key_cache, value_cache,
        block_tables (B, M) int32, context_lens (B,) int32, antiquant_scale, antiquant_offset,
        attn_mask (T, M * block_size) C added to the scores, q_seq_lens (B,) int32 -> (T, H) C.
    WeightQuantBatchMatmul(transpose_x, transpose_weight, antiquant_group_size): x (T, k) C, weight,
        antiquant_scale C, antiquant_offset C like it or None, quant_scale, quant_offset, bias
        -> x @ ((weight + offset) * scale), (T, n) C. weight (k, n) int8, or (n, k) with transpose_weight; or
        (k, n / 2) of dtype ``packed_int4``, column 2 j in the low and 2 j + 1 in the high half of a byte.
        Group size 0: scale (n,); else a multiple of 32 below k and scale (ceil(k / group), n). n, k <= 65535.
    """

    RmsNorm: OpFactory
    Swiglu: OpFactory
    ApplyRotaryPosEmb: OpFactory
    ReshapeAndCache: OpFactory
    FlashAttentionScore: OpFactory
    PagedAttention: OpFactory
    WeightQuantBatchMatmul: OpFactory
    packed_int4: str = "qint4x2"


def mindspore_ops() -> FusedOps:
    """MindSpore's operators. Their front end works on any device, their kernels only on Ascend."""
    from mindspore.ops import auto_generate as ops
    from mindspore.ops.operations.nn_ops import FlashAttentionScore

    return FusedOps(
        RmsNorm=ops.RmsNorm,
        Swiglu=ops.Swiglu,
        ApplyRotaryPosEmb=ops.ApplyRotaryPosEmb,
        ReshapeAndCache=ops.ReshapeAndCache,
        FlashAttentionScore=FlashAttentionScore,
        PagedAttention=ops.PagedAttention,
        WeightQuantBatchMatmul=ops.WeightQuantBatchMatmul,
    )
