"""The pre-norm residual layer from a backend's own cells: what every backend computes, fused or not.

Names are the published checkpoint's, so parameters need no renaming.
"""

from __future__ import annotations

from mindspore import Tensor, nn

from research.qwen.config import QwenConfig
from research.qwen.kernels.api import CacheSpec, FormatOf, Kernels


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


class Layer(nn.Cell):
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
