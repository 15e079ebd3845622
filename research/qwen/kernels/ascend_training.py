"""Cells of the Ascend backend with a backward pass: rows of a batch, no cache, fused operators, strategies for shards.

Not run on an NPU by this project; docs/finetune.md says what is checked and how. Weights are kept in their own dtype
(float32 for full fine-tuning) and cast to the compute dtype where they are used. T = B * S tokens, row after row; what
depends on positions and segments (cos, sin, mask), and what dropout is made of (noise), is made on the host and shared
by all layers, so a pipeline sends nothing but hidden states from stage to stage. Every primitive gets its strategy,
((devices per axis), ...) of each input, from the layout; on one device all of them are 1 and MindSpore ignores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import SiLU

from research.qwen.config import QwenConfig
from research.qwen.kernels.ascend_dropout import Drop
from research.qwen.kernels.ascend_ops import FusedOps, mindspore_ops
from research.qwen.kernels.ascend_packed import Base, Product
from research.qwen.kernels.packing import Packing
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.kernels.training import MATRICES

Place = tuple[int, int]
TRIANGLE = 2048  # side of the compressed causal mask of FlashAttentionScore, sparse_mode 2


@dataclass(frozen=True)
class Spec:
    """What the cells are built from. ``packed``: rows hold several samples, so attention needs a mask of its own.

    ``trained``: the base weights themselves are trained (full), or only adapters and ``saved`` tables (LoRA).
    ``rank`` 0 means no adapters; ``targets`` are the published names of the adapted matrices; ``dropout`` is that of
    their inputs and ``seed`` its seed. ``formats``: of quantised matrices, such as transformer.h.0.mlp.w1 (one device).
    """

    config: QwenConfig
    layout: ParallelLayout = ParallelLayout()
    compute: str = "float16"
    stored: str = "float32"
    packed: bool = False
    trained: bool = True
    saved: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    seed: int = 0
    formats: Mapping[str, Packing] = field(default_factory=dict)
    recompute: bool = False
    fused: FusedOps = field(default_factory=mindspore_ops)

    def adapts(self, name: str) -> bool:
        """Whether the matrix has an adapter; a target is the end of a name, ``c_proj`` meaning both of that name."""
        return self.rank > 0 and any(name == t or name.endswith("." + t) for t in self.targets)

    def place(self, layer: int, name: str) -> Place | None:
        """Where an adapted matrix is: its layer, and its number in it; None without an adapter."""
        return (layer, MATRICES.index(name)) if self.adapts(name) else None

    @property
    def kind(self) -> Any:
        """MindSpore's type of activations."""
        return getattr(ms, self.compute)


def parameter(spec: Spec, name: str, shape: tuple[int, ...], trained: bool, stored: str = "") -> Parameter:
    """A parameter whose memory is made when it is loaded, so that a device only ever holds its own slice.

    Vectors are too small to be worth dividing over the copies of the model (``optimizer`` of the layout).
    """
    kind = getattr(ms, stored or spec.stored)
    data = initializer("zeros", shape, kind)
    return Parameter(data, name=name, requires_grad=trained, parallel_optimizer=len(shape) > 1)


class Linear(nn.Cell):
    """x (T, n_in) -> x W^T + b (T, n_out), with an adapter alpha / rank * B (A x) where asked.

    ``ways`` = (shards of the inputs, shards of the outputs): (1, m) divides the rows of W over m devices and leaves
    the outputs divided; (m, 1) divides its columns, takes divided inputs, and MindSpore adds the parts up.
    """

    def __init__(
        self,
        spec: Spec,
        n_in: int,
        n_out: int,
        bias: bool,
        ways: tuple[int, int],
        place: Place | None = None,
        packing: Packing | None = None,
    ):
        super().__init__()
        rows, (ins, outs) = spec.layout.data, ways
        self.kind = spec.kind
        self.packs = packing is not None
        if packing is None:
            self.weight = parameter(spec, "weight", (n_out, n_in), spec.trained)
        else:
            base = Base(packing, n_out, n_in)
            for name, (shape, kind) in base.shapes.items():
                setattr(self, name, parameter(spec, name, shape, False, kind))
            self.product = Product(base, spec.kind, spec.recompute)
        self.bias = parameter(spec, "bias", (n_out,), spec.trained) if bias else None
        self.matmul = ops.MatMul(transpose_b=True).shard(((rows, ins), (outs, ins)))
        self.add = ops.Add().shard(((rows, outs), (outs,)))
        self.cast = ops.Cast()
        self.adapted = place is not None
        if place is not None:
            self.lora_A = Down(spec, n_in, ins, place)
            self.lora_B = Up(spec, n_out, outs)
            self.join = ops.Add().shard(((rows, outs), (rows, outs)))

    def construct(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.packs:
            y = self.product(x, self.weight, self.scales, self.offsets, self.inverse)
        else:
            y = self.matmul(x, self.cast(self.weight, self.kind))
        if self.bias is not None:
            y = self.add(y, self.cast(self.bias, self.kind))
        if self.adapted:
            y = self.join(y, self.lora_B(self.lora_A(x, noise)))
        return y


def linear(
    spec: Spec, layer: int, name: str, sizes: tuple[int, int], ways: tuple[int, int], bias: bool = False
) -> Linear:
    """A matrix of a layer by its published name: ``sizes`` (n_in, n_out), adapter and format as the Spec says."""
    packing = spec.formats.get(f"transformer.h.{layer}.{name}")
    return Linear(spec, *sizes, bias, ways, spec.place(layer, name), packing)


class Down(nn.Cell):
    """x (T, n_in) -> A x (T, rank), of an x with dropout if there is any; A is float32 and trained."""

    def __init__(self, spec: Spec, n_in: int, ins: int, place: Place):
        super().__init__()
        rows = spec.layout.data
        self.kind = spec.kind
        self.weight = parameter(spec, "weight", (spec.rank, n_in), True, "float32")
        self.matmul = ops.MatMul(transpose_b=True).shard(((rows, ins), (1, ins)))
        self.cast = ops.Cast()
        self.drops = spec.dropout > 0
        if self.drops:
            self.drop = Drop(n_in, place, spec.dropout, spec.seed, (rows, ins))
            self.grow, self.cast_low = ops.Mul().shard(((rows, 1), (rows, 1))), ops.Cast().shard(((rows, 1),))

    def construct(self, x: Tensor, noise: Tensor) -> Tensor:
        weight = self.cast(self.weight, self.kind)
        if not self.drops:
            return self.matmul(x, weight)
        x, growth = self.drop(x, noise)
        return self.cast_low(self.grow(self.cast_low(self.matmul(x, weight), ms.float32), growth), self.kind)


class Up(nn.Cell):
    """A x (T, rank) -> alpha / rank * B (A x) (T, n_out); B is float32 and trained."""

    def __init__(self, spec: Spec, n_out: int, outs: int):
        super().__init__()
        rows = spec.layout.data
        self.kind, self.scale = spec.kind, spec.alpha / spec.rank
        self.weight = parameter(spec, "weight", (n_out, spec.rank), True, "float32")
        self.matmul = ops.MatMul(transpose_b=True).shard(((rows, 1), (outs, 1)))
        self.times = ops.Mul().shard(((rows, outs), ()))
        self.cast = ops.Cast()

    def construct(self, low: Tensor) -> Tensor:
        return self.times(self.matmul(low, self.cast(self.weight, self.kind)), self.scale)


class RMSNorm(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) * weight; the fused kernel keeps the statistics in float32."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.kind = spec.kind
        self.weight = parameter(spec, "weight", (spec.config.hidden_size,), spec.trained)
        self.norm = spec.fused.RmsNorm(spec.config.layer_norm_epsilon)
        shard(self.norm, ((spec.layout.data, 1), (1,)))
        self.cast = ops.Cast()

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.cast(self.weight, self.kind))[0]


class Rotary(nn.Cell):
    """Rotation of (B, heads, S, d) by cos, sin (B, 1, S, d), halves layout, in float32 as the published code does."""

    def __init__(self, spec: Spec):
        super().__init__()
        rows, heads = spec.layout.data, spec.layout.model
        whole, table = (rows, heads, 1, 1), (rows, 1, 1, 1)
        self.kind = spec.kind
        self.cast = ops.Cast().shard((whole,))
        self.split = ops.Split(-1, 2).shard((whole,))
        self.minus = ops.Neg().shard((whole,))
        self.cat = ops.Concat(-1).shard((whole, whole))
        self.times = ops.Mul().shard((whole, table))
        self.add = ops.Add().shard((whole, whole))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = self.cast(x, ms.float32)
        first, second = self.split(wide)
        turned = self.cat((self.minus(second), first))
        return self.cast(self.add(self.times(wide, cos), self.times(turned, sin)), self.kind)


class Attention(nn.Cell):
    """Projection to q, k, v, rotary, FlashAttentionScore over whole rows, output projection.

    With model_parallel every device needs the q, k and v of its own heads, which are three separate bands of the
    published matrix; there ``c_attn`` is three matrices, ``c_attn.q`` and so on (``parallel_names``).
    """

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        config, rows, heads = spec.config, spec.layout.data, spec.layout.model
        hidden = config.hidden_size
        self.heads, self.dim, self.hidden = config.num_heads, config.head_dim, hidden
        self.bands = heads > 1
        self.c_attn = (
            Bands(spec, spec.place(layer, "attn.c_attn"))
            if self.bands
            else linear(spec, layer, "attn.c_attn", (hidden, 3 * hidden), (1, 1), True)
        )
        self.split = ops.Split(1, 3).shard(((rows, 1),))
        self.c_proj = linear(spec, layer, "attn.c_proj", (hidden, hidden), (heads, 1))
        self.rotary = Rotary(spec)
        self.transpose = ops.Transpose().shard(((rows, 1, heads, 1),))
        self.merge = ops.Transpose().shard(((rows, heads, 1, 1),))
        self.packed = spec.packed
        self.flash = flash(spec)
        self.spread = ops.ExpandDims().shard(((rows, 1, 1),))
        self.triangle = Tensor(np.triu(np.ones((TRIANGLE, TRIANGLE), np.uint8), 1))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        qkv = self.c_attn(x, noise)
        q, k, v = qkv if self.bands else self.split(qkv)
        shape = (-1, cos.shape[1], self.heads, self.dim)
        cos, sin = self.spread(cos, 1), self.spread(sin, 1)
        q = self.rotary(self.transpose(q.reshape(shape), (0, 2, 1, 3)), cos, sin)
        k = self.rotary(self.transpose(k.reshape(shape), (0, 2, 1, 3)), cos, sin)
        v = self.transpose(v.reshape(shape), (0, 2, 1, 3))
        unseen = self.spread(mask, 1) if self.packed else self.triangle
        out = self.flash(q, k, v, None, None, None, unseen, None, None, None)[3]  # (B, heads, S, d)
        return self.c_proj(self.merge(out, (0, 2, 1, 3)).reshape((-1, self.hidden)), noise)


class Bands(nn.Cell):
    """q, k and v from three matrices, the rows (heads) of each divided over the devices; one A for all three."""

    def __init__(self, spec: Spec, place: Place | None):
        super().__init__()
        hidden, rows, heads = spec.config.hidden_size, spec.layout.data, spec.layout.model
        self.q, self.k, self.v = (Linear(spec, hidden, hidden, True, (1, heads)) for _ in range(3))
        self.adapted = place is not None
        if place is not None:
            self.lora_A = Down(spec, hidden, 1, place)
            self.lora_B = UpBands(spec)
            self.join = ops.Add().shard(((rows, heads), (rows, heads)))

    def construct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if not self.adapted:
            return q, k, v
        dq, dk, dv = self.lora_B(self.lora_A(x, noise))
        return self.join(q, dq), self.join(k, dk), self.join(v, dv)


class UpBands(nn.Cell):
    """The bands of B of c_attn's adapter."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.q, self.k, self.v = (Up(spec, spec.config.hidden_size, spec.layout.model) for _ in range(3))

    def construct(self, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(low), self.k(low), self.v(low)


class MLP(nn.Cell):
    """c_proj(w1(x) * silu(w2(x))). On one device w1 and w2 go through the fused Swiglu; it wants both in one tensor,
    halves side by side, which shards cannot have, so with model_parallel SiLU and a product stand in its place."""

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        hidden, width = spec.config.hidden_size, spec.config.mlp_width
        rows, ways = spec.layout.data, spec.layout.model
        self.w1 = linear(spec, layer, "mlp.w1", (hidden, width), (1, ways))
        self.w2 = linear(spec, layer, "mlp.w2", (hidden, width), (1, ways))
        self.c_proj = linear(spec, layer, "mlp.c_proj", (width, hidden), (ways, 1))
        self.whole = ways == 1
        self.cat = ops.Concat(-1).shard(((rows, 1), (rows, 1)))
        self.swiglu = spec.fused.Swiglu()
        shard(self.swiglu, ((rows, 1),))
        self.silu = SiLU().shard(((rows, ways),))
        self.times = ops.Mul().shard(((rows, ways), (rows, ways)))

    def construct(self, x: Tensor, noise: Tensor) -> Tensor:
        up, gate = self.w1(x, noise), self.w2(x, noise)
        if self.whole:
            return self.c_proj(self.swiglu(self.cat((gate, up)), -1), noise)
        return self.c_proj(self.times(up, self.silu(gate)), noise)


class Layer(nn.Cell):
    """Pre-norm residual block over (T, hidden); ``layer`` is its number."""

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        whole = (spec.layout.data, 1)
        self.ln_1, self.attn = RMSNorm(spec), Attention(spec, layer)
        self.ln_2, self.mlp = RMSNorm(spec), MLP(spec, layer)
        self.add = ops.Add().shard((whole, whole))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        x = self.add(x, self.attn(self.ln_1(x), cos, sin, mask, noise))
        return self.add(x, self.mlp(self.ln_2(x), noise))


def flash(spec: Spec) -> Any:
    """FlashAttentionScore in layout BNSD.

    Packed rows: a mask (B, S, S) of their own, 1 = hidden. Else sparse_mode 2, causal from the upper left, whose
    mask is the (2048, 2048) triangle whatever S is; padding comes last in a row, so no query before it sees it.
    """
    rows, heads = spec.layout.data, spec.layout.model
    operator = spec.fused.FlashAttentionScore(
        head_num=spec.config.num_heads,
        scale_value=1.0 / math.sqrt(spec.config.head_dim),
        pre_tokens=2147483647,
        next_tokens=0 if not spec.packed else 2147483647,
        inner_precise=0,
        input_layout="BNSD",
        sparse_mode=0 if spec.packed else 2,
    )
    whole = (rows, heads, 1, 1)
    shard(operator, (whole, whole, whole, (rows, 1, 1, 1) if spec.packed else (1, 1)))
    return operator


def shard(operator: Any, strategy: tuple[tuple[int, ...], ...]) -> None:
    """Set the strategy of a fused operator; the stand-ins of the tests are cells and have none."""
    if not isinstance(operator, nn.Cell):
        operator.shard(strategy)
