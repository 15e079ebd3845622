"""What is trained and how: the values that ``open_training`` takes. Imports no MindSpore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from research.qwen.errors import ConfigError

AS_STORED = "as stored"
METHODS = ("full", "lora", "qlora")
MATRICES = (
    "attn.c_attn",
    "attn.c_proj",
    "mlp.w1",
    "mlp.w2",
    "mlp.c_proj",
)  # of a layer, as kernels.training has them
TARGETS: dict[str, tuple[str, ...]] = {
    "c_attn": ("attn.c_attn",),
    "c_proj": ("attn.c_proj", "mlp.c_proj"),
    "w1": ("mlp.w1",),
    "w2": ("mlp.w2",),
    "attn.c_attn": ("attn.c_attn",),
    "attn.c_proj": ("attn.c_proj",),
    "mlp.w1": ("mlp.w1",),
    "mlp.w2": ("mlp.w2",),
    "mlp.c_proj": ("mlp.c_proj",),
    "attention": ("attn.c_attn", "attn.c_proj"),
    "mlp": ("mlp.w1", "mlp.w2", "mlp.c_proj"),
    "all": MATRICES,
}
MODULES = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight", "ln_f": "transformer.ln_f.weight"}


@dataclass(frozen=True)
class MethodSpec:
    """``full``: every parameter; ``lora``: an adapter beside frozen matrices; ``qlora``: beside quantised ones.

    ``base``: format of the frozen matrices of the layers, "as stored" or a scheme such as int8, int4, int4-g64.
    ``targets``: published names (c_proj means both) or attention, mlp, all; ``modules_to_save``: trained whole beside
    an adapter (wte, lm_head, ln_f). Raises ConfigError.
    """

    kind: str = "full"
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: Sequence[str] = ("c_attn", "c_proj", "w1", "w2")
    modules_to_save: Sequence[str] = ()
    base: str = AS_STORED

    def __post_init__(self) -> None:
        if self.kind not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.kind!r}")
        if self.kind == "full":
            return
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"LoRA needs rank >= 1, alpha > 0 and dropout in [0, 1), got {self.rank}, {self.alpha}, {self.dropout}"
            )
        for what, known, given in (
            ("target", TARGETS, self.targets),
            ("module to save", MODULES, self.modules_to_save),
        ):
            wrong = [name for name in given if name not in known]
            if wrong:
                raise ConfigError(f"unknown {what} {wrong[0]!r}; known: {', '.join(known)}")
        if not self.targets:
            raise ConfigError("LoRA without targets trains nothing")

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied with."""
        return self.alpha / self.rank

    def matrices(self) -> tuple[str, ...]:
        """The matrices of a layer that get an adapter, in the order of MATRICES."""
        if self.kind == "full":
            return ()
        wanted = {matrix for target in self.targets for matrix in TARGETS[target]}
        return tuple(matrix for matrix in MATRICES if matrix in wanted)

    def whole(self) -> set[str]:
        """Published names of what is trained whole beside an adapter."""
        return set() if self.kind == "full" else {MODULES[module] for module in self.modules_to_save}


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101) and clipping by the global norm.

    ``decay``: "published" leaves biases out (norm weights are decayed, as the published trainer does), "all" does not.
    ``loss_scale``: start of the dynamic loss scale, None for 65536 where the computation is float16 and none elsewhere;
    it doubles after ``loss_scale_window`` good steps.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "published"
    clip_norm: float | None = 1.0
    loss_scale: float | None = None
    loss_scale_window: int = 1000

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"AdamW needs betas in [0, 1), eps > 0 and weight decay >= 0, got {self.beta1}, {self.beta2}, "
                f"{self.eps}, {self.weight_decay}"
            )
        if self.decay not in ("all", "published"):
            raise ConfigError(f"decay must be all or published, got {self.decay!r}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(
                f"clip_norm must be positive, got {self.clip_norm}; leave it out to clip nothing"
            )
        if self.loss_scale is not None and self.loss_scale <= 0:
            raise ConfigError(f"loss_scale must be positive, got {self.loss_scale}")

    def decays(self, name: str) -> bool:
        """Whether a parameter's weights are decayed."""
        return self.weight_decay > 0 and (self.decay == "all" or not name.endswith(".bias"))
