"""Forward and backward of one layer and of the head, as graph cells of plain operators in float32.

The graph of a layer is compiled once and serves every layer: weights are inputs, and the backward pass is written out
instead of derived, so a model of any depth compiles in the time of one layer, and what is kept between the two passes
is chosen here. T tokens of all texts lie flattened in one dimension; N rows of L places hold them for attention.
``step`` is cos, sin (T, 1, d / 2), pad (N, L), unpad (T,), inside (N, L, 1), mask (1 or N, 1, L, L): see
``model.training_rows``. All gradients are those of the sum of what flows back; the caller scales what it feeds in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
STEP = 6  # tensors of a step
SAVED = 8  # tensors a layer keeps for its backward pass


@dataclass(frozen=True)
class Projection:
    """How one matrix takes part: ``trained`` with its bias, or frozen, with a LoRA pair of ``rank`` beside it or not.

    ``keep``: probability with which the adapter sees an input (1 - dropout).
    """

    bias: bool = False
    trained: bool = False
    rank: int = 0
    scale: float = 0.0
    keep: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """What ``construct`` takes, in order; "keep" (T, n_in) bool is no weight."""
        return (
            "weight",
            *(("bias",) if self.bias else ()),
            *(("lora_A.weight", "lora_B.weight") if self.rank else ()),
            *(("keep",) if self.rank and self.keep < 1.0 else ()),
        )

    @property
    def gradients(self) -> tuple[str, ...]:
        """What the backward pass returns behind dx, in order."""
        own = ("weight", *(("bias",) if self.bias else ())) if self.trained else ()
        return (*own, *(("lora_A.weight", "lora_B.weight") if self.rank else ()))


@dataclass(frozen=True)
class LayerPlan:
    """What the graphs of a layer depend on. ``projections`` in the order of MATRICES."""

    heads: int
    head_dim: int
    eps: float
    norms: bool  # whether the two norms are trained
    projections: tuple[Projection, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names below ``transformer.h.N.`` of the weights (and masks), in the order of the cells' inputs."""
        own = [f"{m}.{part}" for m, p in zip(MATRICES, self.projections, strict=True) for part in p.inputs]
        return ("ln_1.weight", "ln_2.weight", *own)

    @property
    def gradients(self) -> tuple[str, ...]:
        """Names of what LayerBackward returns behind dx."""
        own = [f"{m}.{part}" for m, p in zip(MATRICES, self.projections, strict=True) for part in p.gradients]
        return (*(("ln_1.weight", "ln_2.weight") if self.norms else ()), *own)

    def slices(self) -> list[tuple[int, int]]:
        """Where each projection's inputs lie."""
        out, at = [], 2
        for projection in self.projections:
            out.append((at, at + len(projection.inputs)))
            at += len(projection.inputs)
        return out


class ProjectForward(nn.Cell):
    """(x (T, k), weights) -> x W^T + b + scale * (x kept) A^T B^T."""

    def __init__(self, plan: Projection):
        super().__init__()
        self.bias, self.rank, self.scale = plan.bias, plan.rank, plan.scale
        self.dropout, self.grow = plan.keep < 1.0, 1.0 / plan.keep
        self.at = 2 if plan.bias else 1
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
        y = self.matmul(x, w[0])
        if self.bias:
            y = y + w[1]
        if self.rank:
            if self.dropout:
                x = x * (ops.cast(w[self.at + 2], ms.float32) * self.grow)
            y = y + self.matmul(self.matmul(x, w[self.at]) * self.scale, w[self.at + 1])
        return y


class ProjectBackward(nn.Cell):
    """(dy (T, n), x (T, k), weights) -> (dx, gradients as the plan names them)."""

    def __init__(self, plan: Projection):
        super().__init__()
        self.bias, self.trained, self.rank, self.scale = plan.bias, plan.trained, plan.rank, plan.scale
        self.dropout, self.grow = plan.keep < 1.0, 1.0 / plan.keep
        self.at = 2 if plan.bias else 1
        self.nn, self.nt, self.tn = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
        self.sum = ops.ReduceSum()

    def construct(self, dy: Tensor, x: Tensor, w: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        dx = self.nn(dy, w[0])
        own = (self.tn(dy, x),) if self.trained else ()
        bias = (self.sum(dy, 0),) if self.trained and self.bias else ()
        if not self.rank:
            return dx, own + bias
        low, high = w[self.at], w[self.at + 1]
        kept = ops.cast(w[self.at + 2], ms.float32) * self.grow if self.dropout else 1.0
        x = x * kept if self.dropout else x
        du = self.nn(dy, high) * self.scale  # (T, r)
        through = self.nn(du, low)
        dx = dx + (through * kept if self.dropout else through)
        return dx, own + bias + (self.tn(du, x), self.tn(dy, self.nt(x, low) * self.scale))


class NormForward(nn.Cell):
    """(x (T, H), weight (H,)) -> (normalised x, it times the weight, 1 / root mean square (T, 1))."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = ops.rsqrt(self.mean(x * x, -1) + self.eps)
        hat = x * inverse
        return hat, hat * weight, inverse


class NormBackward(nn.Cell):
    """(dy, normalised x, inverse, weight) -> (dx, gradient of the weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum = ops.ReduceMean(keep_dims=True), ops.ReduceSum()

    def construct(self, dy: Tensor, hat: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        inner = dy * weight
        dx = (inner - hat * self.mean(inner * hat, -1)) * inverse
        return dx, self.sum(dy * hat, 0)


class Rotate(nn.Cell):
    """Rotary embedding on halves of x (T, heads, d); backwards with ``sign`` -1, since rotations are orthogonal."""

    def __init__(self, dim: int, sign: float):
        super().__init__()
        self.half, self.sign = dim // 2, sign

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = ops.split(x, self.half, -1)
        sin = sin * self.sign
        return ops.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Places(nn.Cell):
    """(T, heads, d) -> (N, heads, L, d)."""

    def construct(self, x: Tensor, pad: Tensor) -> Tensor:
        return ops.gather(x, pad, 0).transpose(0, 2, 1, 3)


class Flatten(nn.Cell):
    """(N, heads, L, d) -> (T, H)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.hidden = hidden

    def construct(self, x: Tensor, unpad: Tensor) -> Tensor:
        return ops.gather(x.transpose(0, 2, 1, 3).reshape((-1, self.hidden)), unpad, 0)


class AttentionForward(nn.Cell):
    """(qkv (T, 3 H), step) -> (context (T, H), q, k, v (T, heads, d)): q and k rotated, q scaled by 1 / sqrt(d)."""

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.heads, self.dim = plan.heads, plan.head_dim
        self.hidden, self.scale = plan.heads * plan.head_dim, 1.0 / math.sqrt(plan.head_dim)
        self.rotate, self.places, self.flatten_heads = (
            Rotate(plan.head_dim, 1.0),
            Places(),
            Flatten(self.hidden),
        )
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(self, qkv: Tensor, step: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin, pad, unpad, _, mask = step
        q, k, v = ops.split(qkv, self.hidden, 1)
        q = self.rotate(q.reshape((-1, self.heads, self.dim)), cos, sin) * self.scale
        k = self.rotate(k.reshape((-1, self.heads, self.dim)), cos, sin)
        v = v.reshape((-1, self.heads, self.dim))
        p = self.softmax(self.scores(self.places(q, pad), self.places(k, pad)) + mask)
        return self.flatten_heads(self.mix(p, self.places(v, pad)), unpad), q, k, v


class AttentionBackward(nn.Cell):
    """(gradient of the context (T, H), q, k, v, step) -> gradient of qkv (T, 3 H).

    The probabilities are computed again: keeping them would cost memory in the square of the length.
    """

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.heads, self.dim = plan.heads, plan.head_dim
        self.hidden, self.scale = plan.heads * plan.head_dim, 1.0 / math.sqrt(plan.head_dim)
        self.back, self.places, self.flatten_heads = (
            Rotate(plan.head_dim, -1.0),
            Places(),
            Flatten(self.hidden),
        )
        self.nn, self.nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.tn = ops.BatchMatMul(transpose_a=True)
        self.softmax, self.sum = ops.Softmax(-1), ops.ReduceSum(keep_dims=True)

    def construct(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        cos, sin, pad, unpad, inside, mask = step
        do = ops.gather(do, pad, 0) * inside  # padding repeats a token: nothing may flow back from it
        do = do.reshape(pad.shape + (self.heads, self.dim)).transpose(0, 2, 1, 3)
        q, k, v = self.places(q, pad), self.places(k, pad), self.places(v, pad)
        p = self.softmax(self.nt(q, k) + mask)
        dv = self.tn(p, do)
        dp = self.nt(do, v)
        ds = p * (dp - self.sum(dp * p, -1))
        dq = self.flatten_heads(self.nn(ds, k), unpad).reshape((-1, self.heads, self.dim)) * self.scale
        dk = self.flatten_heads(self.tn(ds, q), unpad).reshape((-1, self.heads, self.dim))
        dq = self.back(dq, cos, sin).reshape((-1, self.hidden))
        dk = self.back(dk, cos, sin).reshape((-1, self.hidden))
        return ops.cat((dq, dk, self.flatten_heads(dv, unpad)), 1)


class LayerForward(nn.Cell):
    """(x (T, H), step, weights) -> (y (T, H), q, k, v, context, x after attention, w1's and w2's output)."""

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.slices = tuple(plan.slices())
        self.norm, self.core = NormForward(plan.eps), AttentionForward(plan)
        self.project = nn.CellList([ProjectForward(p) for p in plan.projections])

    def construct(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        step, w = rest[:STEP], rest[STEP:]
        qkv_at, out_at, w1_at, w2_at, down_at = self.slices
        normed = self.norm(x, w[0])[1]
        context, q, k, v = self.core(self.project[0](normed, w[qkv_at[0] : qkv_at[1]]), step)
        middle = x + self.project[1](context, w[out_at[0] : out_at[1]])
        normed = self.norm(middle, w[1])[1]
        up = self.project[2](normed, w[w1_at[0] : w1_at[1]])
        gate = self.project[3](normed, w[w2_at[0] : w2_at[1]])
        y = middle + self.project[4](up * (gate * ops.sigmoid(gate)), w[down_at[0] : down_at[1]])
        return y, q, k, v, context, middle, up, gate


class LayerBackward(nn.Cell):
    """(dy (T, H), x, what LayerForward kept, step, weights) -> (dx (T, H), gradients as the plan names them)."""

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.slices, self.norms = tuple(plan.slices()), plan.norms
        self.norm, self.unnorm = NormForward(plan.eps), NormBackward()
        self.core = AttentionBackward(plan)
        self.project = nn.CellList([ProjectBackward(p) for p in plan.projections])

    def construct(self, dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        q, k, v, context, middle, up, gate = rest[: SAVED - 1]
        step, w = rest[SAVED - 1 : SAVED - 1 + STEP], rest[SAVED - 1 + STEP :]
        qkv_at, out_at, w1_at, w2_at, down_at = self.slices
        sigmoid = ops.sigmoid(gate)
        silu = gate * sigmoid
        dz, down_grads = self.project[4](dy, up * silu, w[down_at[0] : down_at[1]])
        dgate = dz * up * (sigmoid + silu * (1.0 - sigmoid))
        hat, normed, inverse = self.norm(middle, w[1])
        dn1, w1_grads = self.project[2](dz * silu, normed, w[w1_at[0] : w1_at[1]])
        dn2, w2_grads = self.project[3](dgate, normed, w[w2_at[0] : w2_at[1]])
        dmiddle, d_ln_2 = self.unnorm(dn1 + dn2, hat, inverse, w[1])
        dmiddle = dmiddle + dy
        dcontext, out_grads = self.project[1](dmiddle, context, w[out_at[0] : out_at[1]])
        dqkv = self.core(dcontext, q, k, v, step)
        hat, normed, inverse = self.norm(x, w[0])
        dn, qkv_grads = self.project[0](dqkv, normed, w[qkv_at[0] : qkv_at[1]])
        dx, d_ln_1 = self.unnorm(dn, hat, inverse, w[0])
        grads = (d_ln_1, d_ln_2) if self.norms else ()
        return (dx + dmiddle,) + grads + qkv_grads + out_grads + w1_grads + w2_grads + down_grads


class Logits(nn.Cell):
    """(x (R, H), ln_f (H,), lm_head (V, H)) -> (R, V)."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm, self.matmul = NormForward(eps), ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return self.matmul(self.norm(x, norm)[1], head)


class Log(nn.Cell):
    """Natural logarithm by way of float64: in float32 the last bit depends on where MindSpore's threads begin."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.cast(ops.log(ops.cast(x, ms.float64)), ms.float32)


class HeadLoss(nn.Cell):
    """(x (R, H), targets (R,), ln_f, lm_head) -> losses (R,): logsumexp of the logits minus the target's."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm, self.nt = NormForward(eps), ops.MatMul(transpose_b=True)
        self.max, self.sum = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)
        self.log = Log()

    def construct(self, x: Tensor, targets: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        normed = self.norm(x, norm)[1]
        logits = self.nt(normed, head)
        top = self.max(logits, -1)
        total = self.sum(ops.exp(logits - top), -1)
        own = self.sum(normed * ops.gather(head, targets, 0), -1)
        return (self.log(total) + top - own).reshape((-1,))


class HeadBackward(nn.Cell):
    """(x (R, H), targets (R,), scale (1, 1), ln_f, lm_head) -> (losses (R,), dx, gradient of ln_f [, the head's]).

    Loss and gradient in one pass, so that two arrays of (R, V) live at a time and only here. The head's gradient lacks
    the targets' part: the last output, to be taken from the rows ``targets``, which in a graph would copy (V, H).
    Gradients are those of ``scale`` times the sum of the losses.
    """

    def __init__(self, eps: float, trained: bool):
        super().__init__()
        self.trained = trained
        self.norm, self.unnorm = NormForward(eps), NormBackward()
        self.nn, self.nt, self.tn = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
        self.max, self.sum = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)
        self.log = Log()

    def construct(
        self, x: Tensor, targets: Tensor, scale: Tensor, norm: Tensor, head: Tensor
    ) -> tuple[Tensor, ...]:
        hat, normed, inverse = self.norm(x, norm)
        logits = self.nt(normed, head)
        top = self.max(logits, -1)
        shares = ops.exp(logits - top)
        total = self.sum(shares, -1)
        rows = ops.gather(head, targets, 0)
        losses = (self.log(total) + top - self.sum(normed * rows, -1)).reshape((-1,))
        dnormed = (self.nn(shares, head) / total - rows) * scale
        dx, dnorm = self.unnorm(dnormed, hat, inverse, norm)
        if not self.trained:
            return losses, dx, dnorm
        return losses, dx, dnorm, self.tn(shares, normed * (scale / total)), normed * scale
