"""The cells of kernels.training with everything but most matrix products in C++ (csrc/*training*, text_attention*).

Same inputs and gradients; between the two passes a layer keeps q, k and v as they come from c_attn, the context and
the logarithm of each query's sum. ``step`` is cos, sin (T, d / 2) and bounds (texts + 1,): text i has the tokens
bounds[i] .. bounds[i + 1]. Nothing here grows with the square of a text's length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import DataType

from research.qwen.kernels.cpu_ops import F32, I32, operator
from research.qwen.kernels.training import LayerPlan, Projection

STEP = 3  # tensors of a step
SAVED = 7  # tensors a layer keeps for its backward pass
BOOL = DataType.BOOL_Default


class Norm(nn.Cell):  # type: ignore[misc]
    """(x (T, H), weight (H,)) -> x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, library: Path, eps: float):
        super().__init__()
        self.eps = Tensor(np.array([eps], np.float32))
        self.kernel = operator(library, "QwenRmsNorm", F32, F32, F32)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.kernel(x, weight, self.eps)


class NormGrad(nn.Cell):  # type: ignore[misc]
    """(dy, x (T, H), weight[, what else flows into x]) -> (dx, gradient of the weight)."""

    def __init__(self, library: Path, eps: float, plus: bool):
        super().__init__()
        self.eps, self.plus = Tensor(np.array([eps], np.float32)), plus
        name, more = ("QwenRmsNormGradPlus", (F32,)) if plus else ("QwenRmsNormGrad", ())
        self.kernel = operator(library, name, F32, F32, F32, F32, *more, outputs=2)

    def construct(self, dy: Tensor, x: Tensor, weight: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        if self.plus:
            return self.kernel(dy, x, weight, self.eps, more[0])
        return self.kernel(dy, x, weight, self.eps)


class Attention(nn.Cell):  # type: ignore[misc]
    """(qkv (T, 3 H), step) -> (context (T, H), logarithms (heads, T)); rotary embedding included."""

    def __init__(self, library: Path, heads: int):
        super().__init__()
        self.heads = Tensor(np.zeros(heads, np.float32))  # the kernel takes the number from the shape
        self.kernel = operator(library, "QwenTextAttention", F32, F32, F32, I32, F32, outputs=2)

    def construct(self, qkv: Tensor, step: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.kernel(qkv, step[0], step[1], step[2], self.heads)


class Dropped(nn.Cell):  # type: ignore[misc]
    """(x (T, k), keep (T, k) bool) -> x / probability where it is kept, else 0."""

    def __init__(self, library: Path, keep: float):
        super().__init__()
        self.grow = Tensor(np.array([1.0 / keep], np.float32))
        self.kernel = operator(library, "QwenDropout", F32, BOOL, F32)

    def construct(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.kernel(x, keep, self.grow)


class Project(nn.Cell):  # type: ignore[misc]
    """(x (T, k), weights) -> x W^T + b + scale * (x kept) A^T B^T."""

    def __init__(self, library: Path, plan: Projection):
        super().__init__()
        self.bias, self.rank, self.scale = plan.bias, plan.rank, plan.scale
        self.dropout, self.at = plan.keep < 1.0, 2 if plan.bias else 1
        self.nt = ops.MatMul(transpose_b=True)
        self.add_bias = operator(library, "QwenAddBias", F32, F32)
        self.drop = Dropped(library, plan.keep)

    def construct(self, x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
        y = self.nt(x, w[0])
        if self.bias:
            y = self.add_bias(y, w[1])
        if self.rank:
            seen = self.drop(x, w[self.at + 2]) if self.dropout else x
            y = y + self.nt(self.nt(seen, w[self.at]) * self.scale, w[self.at + 1])
        return y


class ProjectGrad(nn.Cell):  # type: ignore[misc]
    """(dy (T, n), x (T, k), weights) -> (dx, gradients as the plan names them)."""

    def __init__(self, library: Path, plan: Projection):
        super().__init__()
        self.bias, self.trained, self.rank, self.scale = plan.bias, plan.trained, plan.rank, plan.scale
        self.dropout, self.at = plan.keep < 1.0, 2 if plan.bias else 1
        # MindSpore's is a third slower where b is a table.
        self.nn = operator(library, "QwenProduct", F32, F32)
        self.nt, self.tn = ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
        self.sum_rows = operator(library, "QwenSumRows", F32)
        self.drop = Dropped(library, plan.keep)

    def construct(self, dy: Tensor, x: Tensor, w: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        dx = self.nn(dy, w[0])
        own = (self.tn(dy, x),) if self.trained else ()
        bias = (self.sum_rows(dy),) if self.trained and self.bias else ()
        if not self.rank:
            return dx, own + bias
        low, high = w[self.at], w[self.at + 1]
        seen = self.drop(x, w[self.at + 2]) if self.dropout else x
        du = self.nn(dy, high) * self.scale  # (T, r)
        through = self.nn(du, low)
        dx = dx + (self.drop(through, w[self.at + 2]) if self.dropout else through)
        return dx, own + bias + (self.tn(du, seen), self.tn(dy, self.nt(seen, low) * self.scale))


class LayerForward(nn.Cell):  # type: ignore[misc]
    """(x (T, H), step, weights) -> (y (T, H), qkv, context, logarithms, x after attention, w1's and w2's output)."""

    def __init__(self, library: Path, plan: LayerPlan):
        super().__init__()
        self.slices = tuple(plan.slices())
        self.norm, self.core = Norm(library, plan.eps), Attention(library, plan.heads)
        self.swiglu = operator(library, "QwenSwiGlu", F32, F32)
        self.project = nn.CellList([Project(library, p) for p in plan.projections])

    def construct(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        step, w = rest[:STEP], rest[STEP:]
        qkv_at, out_at, w1_at, w2_at, down_at = self.slices
        qkv = self.project[0](self.norm(x, w[0]), w[qkv_at[0] : qkv_at[1]])
        context, logs = self.core(qkv, step)
        middle = x + self.project[1](context, w[out_at[0] : out_at[1]])
        normed = self.norm(middle, w[1])
        up = self.project[2](normed, w[w1_at[0] : w1_at[1]])
        gate = self.project[3](normed, w[w2_at[0] : w2_at[1]])
        y = middle + self.project[4](self.swiglu(up, gate), w[down_at[0] : down_at[1]])
        return y, qkv, context, logs, middle, up, gate


class LayerBackward(nn.Cell):  # type: ignore[misc]
    """(dy (T, H), x, what LayerForward kept, step, weights) -> (dx (T, H), gradients as the plan names them)."""

    def __init__(self, library: Path, plan: LayerPlan):
        super().__init__()
        self.slices, self.norms = tuple(plan.slices()), plan.norms
        self.norm, self.unnorm = Norm(library, plan.eps), NormGrad(library, plan.eps, plus=True)
        self.core = operator(library, "QwenTextAttentionGrad", F32, F32, F32, I32, F32, F32, F32)
        self.swiglu = operator(library, "QwenSwiGlu", F32, F32)
        self.swiglu_grad = operator(library, "QwenSwiGluGrad", F32, F32, F32, outputs=2)
        self.project = nn.CellList([ProjectGrad(library, p) for p in plan.projections])

    def construct(self, dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        qkv, context, logs, middle, up, gate = rest[: SAVED - 1]
        step, w = rest[SAVED - 1 : SAVED - 1 + STEP], rest[SAVED - 1 + STEP :]
        qkv_at, out_at, w1_at, w2_at, down_at = self.slices
        dz, down_grads = self.project[4](dy, self.swiglu(up, gate), w[down_at[0] : down_at[1]])
        dup, dgate = self.swiglu_grad(up, gate, dz)
        normed = self.norm(middle, w[1])
        dn1, w1_grads = self.project[2](dup, normed, w[w1_at[0] : w1_at[1]])
        dn2, w2_grads = self.project[3](dgate, normed, w[w2_at[0] : w2_at[1]])
        dmiddle, d_ln_2 = self.unnorm(dn1 + dn2, middle, w[1], dy)
        dcontext, out_grads = self.project[1](dmiddle, context, w[out_at[0] : out_at[1]])
        dqkv = self.core(qkv, step[0], step[1], step[2], context, logs, dcontext)
        dn, qkv_grads = self.project[0](dqkv, self.norm(x, w[0]), w[qkv_at[0] : qkv_at[1]])
        dx, d_ln_1 = self.unnorm(dn, x, w[0], dmiddle)
        grads = (d_ln_1, d_ln_2) if self.norms else ()
        return (dx,) + grads + qkv_grads + out_grads + w1_grads + w2_grads + down_grads


class Logits(nn.Cell):  # type: ignore[misc]
    """(x (R, H), ln_f (H,), lm_head (V, H)) -> (R, V)."""

    def __init__(self, library: Path, eps: float):
        super().__init__()
        self.norm, self.nt = Norm(library, eps), ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return self.nt(self.norm(x, norm), head)


class HeadLoss(nn.Cell):  # type: ignore[misc]
    """(x (R, H), targets (R,), ln_f, lm_head) -> losses (R,)."""

    def __init__(self, library: Path, eps: float):
        super().__init__()
        self.logits, self.one = Logits(library, eps), Tensor(np.ones(1, np.float32))
        self.loss = operator(library, "QwenCrossEntropy", F32, I32, F32)

    def construct(self, x: Tensor, targets: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return self.loss(self.logits(x, norm, head), targets, self.one)


class HeadBackward(nn.Cell):  # type: ignore[misc]
    """(x (R, H), targets (R,), scale (1, 1), ln_f, lm_head) -> (losses (R,), dx, gradient of ln_f [, the head's]).

    Loss and gradients in one pass; the logits become their gradient where they lie, the only array of (R, V).
    Gradients are those of ``scale`` times the sum of the losses.
    """

    def __init__(self, library: Path, eps: float, trained: bool):
        super().__init__()
        self.trained = trained
        self.norm, self.unnorm = Norm(library, eps), NormGrad(library, eps, plus=False)
        # MindSpore's is a third slower where b is a table.
        self.nn = operator(library, "QwenProduct", F32, F32)
        self.nt, self.tn = ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
        self.loss = operator(library, "QwenCrossEntropy", F32, I32, F32)

    def construct(
        self, x: Tensor, targets: Tensor, scale: Tensor, norm: Tensor, head: Tensor
    ) -> tuple[Tensor, ...]:
        normed = self.norm(x, norm)
        logits = self.nt(normed, head)
        losses = self.loss(logits, targets, scale.reshape((1,)))
        flow = ops.depend(logits, losses)  # the products below come after the change in place
        dx, dnorm = self.unnorm(self.nn(flow, head), x, norm)
        if not self.trained:
            return losses, dx, dnorm
        return losses, dx, dnorm, self.tn(flow, normed)
