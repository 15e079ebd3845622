"""adapter_config.json of a LoRA adapter, as peft writes and reads it.

Of its many fields few change what an adapter computes. Those are understood or refused by name; a field this module
has never heard of is refused too unless it is off, since a newer release may have given it a meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.qwen.config import read_json
from research.qwen.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
WHOLE_MODULES = ("wte", "lm_head")  # what modules_to_save may name

# Field -> why an adapter that uses it is refused.
_REFUSED = {
    "use_dora": "DoRA rescales the whole matrix",
    "lora_bias": "a bias beside lora_B",
    "fan_in_fan_out": "transposed matrices",
    "use_qalora": "QALoRA pools the inputs",
    "trainable_token_indices": "single rows of the embedding",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "a model with repeated layers",
    "alora_invocation_tokens": "an adapter that starts in mid-text",
    "arrow_config": "routing between adapters",
    "megatron_config": "Megatron's parallel layers",
    "auto_mapping": "classes of another library",
    "use_bdlora": "block-diagonal factors",
    "velora_config": "compressed inputs",
}
# How training began, or how it is resumed: no trace of it in the sum W + scale * B A.
_NEUTRAL = {
    "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
_USED = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations that also change the base's weights
_WAY_OUT = "save it again as a plain LoRA adapter (peft: bias none, no DoRA), or merge it with peft"


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's numbers mean.

    Args:
        rank, alpha: W' = W + alpha / rank * B A; with ``rslora`` alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.
        targets: names or ends of names of the adapted modules (``c_proj`` means both), or peft's pattern as one text.
        modules_to_save: matrices that are trained whole and lie in the adapter: of WHOLE_MODULES.
        dropout: on the input of lora_A while training.
        rank_pattern, alpha_pattern: (pattern, value) for modules that differ, as peft matches them.
        partial: only some layers or modules are adapted, so missing ones are no damage.
        base: the model it belongs to, as its trainer named it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    modules_to_save: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    partial: bool = False
    base: str = ""

    def __post_init__(self) -> None:
        ranks = [self.rank, *(value for _, value in self.rank_pattern)]
        if any(not _is_count(value) for value in ranks):
            raise ConfigError(f"the rank of an adapter (r) must be an integer of at least 1, got {ranks}")
        alphas = [self.alpha, *(value for _, value in self.alpha_pattern)]
        if any(not _is_number(value) or not math.isfinite(value) for value in alphas):
            raise ConfigError(f"lora_alpha must be a finite number, got {alphas}")
        strange = [name for name in self.modules_to_save if name not in WHOLE_MODULES]
        if strange:
            raise ConfigError(
                f"modules_to_save {strange} is not supported; known: {', '.join(WHOLE_MODULES)}"
            )

    def module_rank(self, module: str) -> int:
        """Rank of one module, by its published name without ``.weight``."""
        return int(_matched(self.rank_pattern, module, self.rank))

    def scale(self, module: str) -> float:
        """The factor in front of B A for one module."""
        rank = self.module_rank(module)
        return float(_matched(self.alpha_pattern, module, self.alpha)) / (
            math.sqrt(rank) if self.rslora else rank
        )

    def is_target(self, module: str) -> bool:
        """Whether ``targets`` names this module; peft's rule: the whole name, its end after a dot, or the pattern."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.targets)

    @classmethod
    def from_file(cls, path: Path) -> AdapterConfig:
        """Read adapter_config.json. ConfigError: missing, malformed, or an adapter that is no plain LoRA."""
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """From the fields of adapter_config.json; ConfigError for one that is missing, wrong or not supported."""
        _refuse(raw)
        targets = raw.get("target_modules")
        if not isinstance(targets, str) and not _are_names(targets):
            raise ConfigError(f"target_modules must be a list of names or a pattern, got {targets!r}")
        saved = raw.get("modules_to_save") or []
        if not _are_names(saved):
            raise ConfigError(f"modules_to_save must be a list of names, got {saved!r}")
        return cls(
            rank=raw.get("r", 0),
            alpha=raw.get("lora_alpha", math.nan),
            targets=targets if isinstance(targets, str) else tuple(str(name) for name in targets or ()),
            modules_to_save=tuple(str(name).removeprefix("transformer.") for name in saved),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora")),
            rank_pattern=_pattern(raw, "rank_pattern"),
            alpha_pattern=_pattern(raw, "alpha_pattern"),
            partial=raw.get("layers_to_transform") is not None or bool(raw.get("exclude_modules")),
            base=str(raw.get("base_model_name_or_path") or ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields peft needs to load the adapter; keys in alphabetical order, as it writes them."""
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "auto_mapping": None,
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "revision": None,
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.rslora,
        }


def _refuse(raw: Mapping[str, Any]) -> None:
    """ConfigError for what would change the maths and is not computed here."""
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"peft_type {raw.get('peft_type')!r} is not supported, only LORA")
    if raw.get("bias", "none") != "none":
        raise ConfigError(f"bias {raw['bias']!r} (trained biases) is not supported; {_WAY_OUT}")
    for field, why in _REFUSED.items():
        if raw.get(field):
            raise ConfigError(f"{field} ({why}) is not supported; {_WAY_OUT}")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"init_lora_weights {start!r} changed the base's own weights, which the adapter does not hold; save it "
            "with peft's path_initial_model_for_weight_conversion, or merge it with peft"
        )
    known = _NEUTRAL | _USED | set(_REFUSED)
    strange = [field for field, value in raw.items() if field not in known and value]
    if strange:
        raise ConfigError(f"unknown field {strange[0]} = {raw[strange[0]]!r}: it may change what the adapter computes; "
                          f"remove it from {CONFIG_FILE} if it does not, else {_WAY_OUT}")  # fmt: skip


def _pattern(raw: Mapping[str, Any], field: str) -> tuple[tuple[str, Any], ...]:
    value = raw.get(field) or {}
    if not isinstance(value, dict) or not all(_is_number(number) for number in value.values()):
        raise ConfigError(f"{field} must be a table from module patterns to numbers, got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{field}: {pattern!r} is not a pattern: {error}") from None
    return tuple(value.items())


def _matched(pattern: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", module)), default)


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
