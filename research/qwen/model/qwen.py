"""The first-generation Qwen architecture: layers only. No loading, no sampling, no device word.

Cells take flattened tokens (T, hidden) and hand the kernels' step tuple through untouched.
Names are the published checkpoint's, so parameters need no renaming.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, nn, ops

from research.qwen.config import QwenConfig
from research.qwen.kernels.api import CacheSpec, FormatOf, Kernels
from research.qwen.kernels.lora import Updates


class Transformer(nn.Cell):
    """Embedding and blocks; ``ln_f`` is applied by the model to the rows it needs."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, fmt: FormatOf):
        super().__init__()
        self.wte = kernels.embedding(config.vocab_size, config.hidden_size, fmt("transformer.wte.weight"))
        self.h = nn.CellList(
            [kernels.layer(config, cache, f"transformer.h.{i}", fmt) for i in range(config.num_layers)]
        )
        self.fused = kernels.fuse(config, cache, list(self.h))
        self.ln_f = kernels.rms_norm(config.hidden_size, config.layer_norm_epsilon)

    def adapt(self, kernels: Kernels, adapters: Sequence[Updates]) -> None:
        """Compute these low-rank adapters beside the weights, once those are loaded (``StepView.adapters``)."""
        if self.fused is not None:
            self.fused.adapt(adapters)
        else:
            self.h = nn.CellList(list(kernels.adapt(list(self.h), adapters)), auto_prefix=False)

    def construct(self, ids: Tensor, rows: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        x = self.wte(ids)
        if self.fused is not None:
            return self.fused(x, rows, step)
        for layer in self.h:
            x = layer(x, step)
        return ops.gather(x, rows, 0)


class QwenModel(nn.Cell):
    """ids (T,) int32, rows (R,) int32, step tensors -> logits (R, vocab_size) of the asked token rows."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, fmt: FormatOf):
        super().__init__()
        self.transformer = Transformer(config, kernels, cache, fmt)
        self.lm_head = kernels.linear(config.hidden_size, config.vocab_size, False, fmt("lm_head.weight"))

    def construct(self, ids: Tensor, rows: Tensor, *step: Tensor) -> Tensor:
        x = self.transformer(ids, rows, step)
        return self.lm_head(self.transformer.ln_f(x))


class HiddenStates(nn.Cell):
    """The rows of hidden states that the head of a model would see: (R, hidden), after ``ln_f``. Shares its weights."""

    def __init__(self, model: QwenModel):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.transformer = model.transformer

    def construct(self, ids: Tensor, rows: Tensor, *step: Tensor) -> Tensor:
        return self.transformer.ln_f(self.transformer(ids, rows, step))
