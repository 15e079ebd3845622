"""Run one pass through a model's own cells, keeping every intermediate value."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from research.qwen.kernels.api import StepView
from research.qwen.model.runtime import Runtime


class Traced(nn.Cell):
    """The same layers in the same order as QwenModel, returning what each gives."""

    def __init__(self, model):
        super().__init__()
        self.transformer, self.lm_head = model.transformer, model.lm_head

    def construct(self, ids, *step):
        x = self.transformer.wte(ids)
        kept = (x,)
        for block in self.transformer.h:
            normed = block.ln_1(x)
            qkv = block.attn.c_attn(normed)
            attended = block.attn.c_proj(block.attn.core(qkv, step))
            x = x + attended
            second = block.ln_2(x)
            a, b = block.mlp.w1(second), block.mlp.w2(second)
            out = block.mlp.c_proj(block.mlp.swiglu(a, b))
            x = x + out
            kept = kept + (normed, qkv, attended, second, a, b, out, x)
        last = self.transformer.ln_f(x)
        return kept + (last, self.lm_head(last))


LAYER_NAMES = ("ln_1", "c_attn", "attn_c_proj", "ln_2", "w1", "w2", "mlp_c_proj", "block")


def trace(runtime: Runtime, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Name in trace.npz -> value."""
    config, count = runtime.config, len(ids)
    view = StepView([0], [count], [1.0], [list(range(-(-count // runtime.block_size)))])
    names = {name: p.name for name, p in runtime.model.parameters_and_names()}
    net = Traced(runtime.model)
    net.set_train(False)
    step = runtime.kernels.make_step(view, config, runtime.cache)
    outputs = net.compile_and_run(Tensor(np.asarray(ids), ms.int32), *step)
    for name, parameter in runtime.model.parameters_and_names():
        parameter.name = names[name]  # wrapping the cells has prefixed them
    values = [np.asarray(value.asnumpy()) for value in outputs]
    kept = {"embeddings": values[0], "ln_f": values[-2], "logits": values[-1]}
    for layer, block in enumerate(runtime.model.transformer.h):
        for place, name in enumerate(LAYER_NAMES):
            kept[f"h{layer}_{name}"] = values[1 + layer * len(LAYER_NAMES) + place]
        for part, cached in zip(("key", "value"), block.attn.core.read_cache(), strict=True):
            kept[f"h{layer}_cache_{part}"] = cached[:count]
    return kept
