"""The first-generation Qwen architecture: layers only. No loading, no sampling, no device word.

Cells take flattened tokens (T, hidden) and hand the kernels' step tuple through untouched.
Names are the published checkpoint's, so parameters need no renaming.
"""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn, ops

from research.qwen.config import QwenConfig
from research.qwen.kernels.api import CacheSpec, Kernels

FormatOf = Callable[[str], str]


class Attention(nn.Cell):
    """Fused q, k, v projection (with bias), attention over the paged cache, output projection."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, prefix: str, fmt: FormatOf):
        super().__init__()
        hidden = config.hidden_size
        self.c_attn = kernels.linear(hidden, 3 * hidden, True, fmt(f"{prefix}.c_attn.weight"))
        self.core = kernels.attention(config, cache)
        self.c_proj = kernels.linear(hidden, hidden, False, fmt(f"{prefix}.c_proj.weight"))

    def construct(self, x: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        return self.c_proj(self.core(self.c_attn(x), step))


class MLP(nn.Cell):
    """c_proj(w1(x) * silu(w2(x))): the activation is on w2."""

    def __init__(self, config: QwenConfig, kernels: Kernels, prefix: str, fmt: FormatOf):
        super().__init__()
        hidden, width = config.hidden_size, config.mlp_width
        self.w1 = kernels.linear(hidden, width, False, fmt(f"{prefix}.w1.weight"))
        self.w2 = kernels.linear(hidden, width, False, fmt(f"{prefix}.w2.weight"))
        self.swiglu = kernels.swiglu()
        self.c_proj = kernels.linear(width, hidden, False, fmt(f"{prefix}.c_proj.weight"))

    def construct(self, x: Tensor) -> Tensor:
        return self.c_proj(self.swiglu(self.w1(x), self.w2(x)))


class Block(nn.Cell):
    """Pre-norm residual block."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, prefix: str, fmt: FormatOf):
        super().__init__()
        self.ln_1 = kernels.rms_norm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, kernels, cache, f"{prefix}.attn", fmt)
        self.ln_2 = kernels.rms_norm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config, kernels, f"{prefix}.mlp", fmt)

    def construct(self, x: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        x = x + self.attn(self.ln_1(x), step)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Cell):
    """Embedding and blocks; ``ln_f`` is applied by the model to the rows it needs."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, fmt: FormatOf):
        super().__init__()
        self.wte = kernels.embedding(config.vocab_size, config.hidden_size, fmt("transformer.wte.weight"))
        self.h = nn.CellList(
            [Block(config, kernels, cache, f"transformer.h.{i}", fmt) for i in range(config.num_layers)]
        )
        self.ln_f = kernels.rms_norm(config.hidden_size, config.layer_norm_epsilon)

    def construct(self, ids: Tensor, step: tuple[Tensor, ...]) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x, step)
        return x


class QwenModel(nn.Cell):
    """ids (T,) int32, rows (R,) int32, step tensors -> logits (R, vocab_size) of the asked token rows."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, fmt: FormatOf):
        super().__init__()
        self.transformer = Transformer(config, kernels, cache, fmt)
        self.lm_head = kernels.linear(config.hidden_size, config.vocab_size, False, fmt("lm_head.weight"))

    def construct(self, ids: Tensor, rows: Tensor, *step: Tensor) -> Tensor:
        x = self.transformer(ids, step)
        return self.lm_head(self.transformer.ln_f(ops.gather(x, rows, 0)))
