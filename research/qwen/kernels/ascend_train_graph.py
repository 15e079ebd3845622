"""The whole training step of the Ascend backend as one graph: loss, gradients, clipping, loss scale, AdamW.

Not run on an NPU by this project. Inputs of a step, all made on the host: ids, targets (T,) int32; shares (T,) float32,
1 / number of tokens learned from in the whole step, 0 where nothing is learned, so that losses and gradients of
micro batches, rows and devices are simply added up; cos, sin (B, S, d) float32; mask (B, S, S) uint8, 1 = not seen;
noise (T, 4) int32, the words of ``dropout_words``, not looked at without dropout.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, lazy_inline, nn, ops
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
from mindspore.parallel.nn import GradAccumulation

from research.qwen.kernels.ascend_training import Layer, Linear, RMSNorm, Spec, parameter
from research.qwen.kernels.parallel_layout import ParallelLayout


class Embedding(nn.Cell):
    """ids (T,) -> rows of the table (T, hidden), in the compute dtype."""

    def __init__(self, spec: Spec):
        super().__init__()
        config, layout = spec.config, spec.layout
        trained = spec.trained or "wte" in spec.saved
        self.weight = parameter(spec, "weight", (config.vocab_size, config.hidden_size), trained)
        ways = 1 if layout.whole_embedding else layout.model
        self.gather = ops.Gather().shard(((ways, 1), (layout.data,)))
        self.cast, self.kind = ops.Cast(), spec.kind

    def construct(self, ids: Tensor) -> Tensor:
        return self.cast(self.gather(self.weight, ids, 0), self.kind)


class Transformer(nn.Cell):
    """ids (T,) and what depends on positions -> hidden states (T, hidden) behind the last norm."""

    def __init__(self, spec: Spec):
        super().__init__()
        layers, layout = spec.config.num_layers, spec.layout
        self.wte = Embedding(spec)
        self.h = nn.CellList([Layer(spec, i) for i in range(layers)])
        self.ln_f = RMSNorm(spec)
        if layout.stages > 1:
            self.wte.pipeline_stage = 0
            for i, layer in enumerate(self.h):
                layer.pipeline_stage = layout.stage_of(i, layers)
            self.ln_f.pipeline_stage = layout.stages - 1
        if spec.recompute:
            for layer in self.h:
                layer.recompute()

    def construct(self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        x = self.wte(ids)
        for layer in self.h:
            x = layer(x, cos, sin, mask, noise)
        return self.ln_f(x)


class TokenLoss(nn.Cell):
    """(logits (T, V), targets, shares (T,)) -> sum of shares * (logsumexp - logit of the target), in float32.

    The columns of the logits stay divided over the devices of a ``model`` group; only sums per row are exchanged.
    """

    def __init__(self, spec: Spec):
        super().__init__()
        rows, ways = spec.layout.data, spec.layout.model
        wide, tall = (rows, ways), (rows, 1)
        self.vocabulary = spec.config.vocab_size
        self.cast = ops.Cast().shard((wide,))
        self.top = ops.ReduceMax(keep_dims=True).shard((wide,))
        self.minus = ops.Sub().shard((wide, tall))
        self.exp = ops.Exp().shard((wide,))
        self.sum = ops.ReduceSum(keep_dims=True).shard((wide,))
        self.log = ops.Log().shard((tall,))
        self.one_hot = ops.OneHot().shard((wide, (), ()))
        self.times = ops.Mul().shard((wide, wide))
        self.less = ops.Sub().shard((tall, tall))
        self.weigh = ops.Mul().shard(((rows,), (rows,)))
        self.total = ops.ReduceSum().shard(((rows,),))
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        logits = self.cast(logits, ms.float32)
        logits = self.minus(logits, ops.stop_gradient(self.top(logits, -1)))
        own = self.sum(self.times(logits, self.one_hot(targets, self.vocabulary, self.on, self.off)), -1)
        losses = self.less(self.log(self.sum(self.exp(logits), -1)), own)
        return self.total(self.weigh(losses.reshape((-1,)), shares))


class TrainingModel(nn.Cell):
    """Inputs of a step (module docstring) -> its loss, a scalar."""

    def __init__(self, spec: Spec):
        super().__init__()
        config, layout = spec.config, spec.layout
        self.spec = spec
        self.transformer = Transformer(spec)
        self.lm_head = Linear(spec, config.hidden_size, config.vocab_size, False, (1, layout.model))
        self.lm_head.weight.requires_grad = spec.trained or "lm_head" in spec.saved
        self.loss = TokenLoss(spec)
        if layout.stages > 1:
            self.lm_head.pipeline_stage = layout.stages - 1
            self.loss.pipeline_stage = layout.stages - 1

    def construct(
        self,
        ids: Tensor,
        targets: Tensor,
        shares: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        noise: Tensor,
    ) -> Tensor:
        return self.loss(self.lm_head(self.transformer(ids, cos, sin, mask, noise)), targets, shares)


class RepeatedModel(TrainingModel):
    """A TrainingModel whose graph is kept whole for every micro batch, as MindSpore wants it on several devices."""

    @lazy_inline
    def __init__(self, spec: Spec):
        super().__init__(spec)


def accumulates(layout: ParallelLayout) -> bool:
    """Whether MindSpore itself adds up micro batches: on several devices, in stages or not."""
    return layout.devices > 1 and layout.micro_batches > 1


def model_for(spec: Spec) -> TrainingModel:
    """The model that a StepGraph of this layout takes."""
    return RepeatedModel(spec) if accumulates(spec.layout) else TrainingModel(spec)


_square = ops.MultitypeFuncGraph("qwen_square")
_times = ops.MultitypeFuncGraph("qwen_times")
_adamw = ops.MultitypeFuncGraph("qwen_adamw")
# The mark by which MindSpore knows a norm of gradients, and completes it with the sums over shards and stages.
_marked = ops.ExpandDims().add_prim_attr("grad_scale", True)


@_square.register("Tensor")
def _square_sum(gradient):
    return _marked(ops.ReduceSum(False)(ops.square(gradient), ()), 0)


@_times.register("Tensor", "Tensor")
def _multiplied(factor, gradient):
    return ops.cast(gradient, ms.float32) * factor


@_adamw.register("Tensor", "Tensor", "Number", "Tensor", "Tensor", "Tensor", "Tensor")
def _adamw_update(keep, numbers, decay, weight, first, second, gradient):
    """One AdamW update in float32, https://arxiv.org/abs/1711.05101; nothing changes unless ``keep``."""
    beta1, beta2, eps, bias1, bias2, rate = tuple(numbers[i] for i in range(6))
    first_new = beta1 * first + (1.0 - beta1) * gradient
    second_new = beta2 * second + (1.0 - beta2) * gradient * gradient
    wide = ops.cast(weight, ms.float32)
    change = first_new / bias1 / (ops.sqrt(second_new / bias2) + eps) + decay * wide
    done = ops.assign(weight, ops.cast(ops.where(keep, wide - rate * change, wide), weight.dtype))
    done = ops.depend(ops.assign(first, ops.where(keep, first_new, first)), done)
    return ops.depend(ops.assign(second, ops.where(keep, second_new, second)), done)


class StepGraph(nn.Cell):
    """Inputs of a step -> (loss, norm of the gradients, whether they are finite); the weights are updated.

    ``shares`` hold the loss scale too, so the loss comes out multiplied by it. ``numbers`` (7,) is set by the host
    before each step: beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, learning rate, loss scale. Gradients that are not
    finite change nothing: their norm, which all devices share, says so to all of them. ``decays``: weight decay of
    every trained parameter, in order. With ``micro_batches`` the rows are cut into so many equal parts.
    """

    def __init__(self, model: TrainingModel, spec: Spec, decays: tuple[float, ...], clip: float | None):
        super().__init__(auto_prefix=False)
        layout = spec.layout
        network: nn.Cell = model
        if accumulates(layout):
            network = (nn.PipelineCell if layout.stages > 1 else GradAccumulation)(
                model, layout.micro_batches
            )
        elif layout.micro_batches > 1:
            network = MicroBatches(model, layout.micro_batches)
        self.network = _VirtualDatasetCell(network) if layout.devices > 1 else network
        self.network.set_train()
        self.weights = ParameterTuple(model.trainable_params())
        self.first = self.weights.clone(prefix="adam_m", init="zeros")
        self.second = self.weights.clone(prefix="adam_v", init="zeros")
        # On several devices the gradients of micro batches are added up in parameters of MindSpore's.
        self.gathered = nn.PipelineGradReducer(self.weights) if accumulates(layout) else None
        start = np.array([0.9, 0.95, 1e-8, 1.0, 1.0, 0.0, 1.0], np.float32)
        self.numbers = Parameter(Tensor(start), name="numbers", requires_grad=False)
        self.both = ops.value_and_grad(self.network, None, self.weights)
        self.map = ops.HyperMap()
        self.decays, self.clip = decays, clip

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, grads = self.both(*inputs)
        if self.gathered is not None:
            grads = self.gathered(grads)
        grads = self.map(ops.partial(_times, 1.0 / self.numbers[6]), grads)
        norm = ops.sqrt(ops.addn(self.map(_square, grads)))
        finite = ops.isfinite(norm).reshape(())
        if self.clip is not None:
            grads = self.map(ops.partial(_times, ops.minimum(self.clip / (norm + 1e-6), 1.0)), grads)
        # No branch: what a branch alone reads keeps its old memory when the host sets it anew.
        update = ops.partial(_adamw, finite, self.numbers)
        done = self.map(update, self.decays, self.weights, self.first, self.second, grads)
        return ops.depend(loss, done), norm, finite


class MicroBatches(nn.Cell):
    """The sum of the losses of equal parts of the rows, one after the other."""

    def __init__(self, model: nn.Cell, parts: int):
        super().__init__(auto_prefix=False)
        self.model, self.parts = model, parts

    def part(self, inputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        cut: tuple[Tensor, ...] = ()
        for value in inputs:
            size = value.shape[0] // self.parts
            cut += (value[i * size : (i + 1) * size],)
        return cut

    def construct(self, *inputs: Tensor) -> Tensor:
        total = 0.0
        for i in range(self.parts):
            total = total + self.model(*self.part(inputs, i))
        return total
