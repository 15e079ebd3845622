"""LlamaConfig to what we run: every key known, every value checked, defaults that would be wrong for Qwen replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mindformers.models import LlamaConfig

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.settings import END_OF_TEXT, RunSettings, settings_from_mapping, validate

WHERE = "LlamaConfig"
SET_BY_MINDFORMERS = frozenset(
    "parallel_config moe_config name_or_path mindformers_version model_type disable_lazy_inline".split()
)
_REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_heads", "seq_length", "intermediate_size")
_UNSUPPORTED = (
    "pet_config",
    "quant_config",
    "quantization_config",
    "quantization",
    "parallel_decoding_params",
)
# LlamaConfig's own defaults, ids of another vocabulary: nobody meant them for the published Qwen vocabulary.
_FOREIGN = {"eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class ModelSettings:
    """A checked LlamaConfig: the shape, what RunSettings says, and the generation values as given."""

    shape: QwenConfig
    run: RunSettings
    generation: Mapping[str, Any]


@cache
def _baseline() -> tuple[dict[str, Any], frozenset[str]]:
    """What LlamaConfig() holds by itself, and the attributes that are no arguments of it."""
    values = LlamaConfig().to_dict()
    arguments = inspect.signature(LlamaConfig.__init__).parameters
    return values, frozenset(values) - frozenset(arguments)


def given_values(config: LlamaConfig) -> dict[str, Any]:
    """The keys of a config that differ from LlamaConfig's defaults or that it does not know."""
    base, internal = _baseline()
    return {
        key: _plain(value)
        for key, value in config.to_dict().items()
        if key not in internal
        and key not in SET_BY_MINDFORMERS
        and not key.startswith("_")
        and (key not in base or value != base[key] or key in _REQUIRED)
    }


def read_config(config: LlamaConfig) -> ModelSettings:
    """Check a LlamaConfig and read the model from it.

    Raises:
        ConfigError: an unknown key (a typo, or a name of another port), a wrong value, or a feature Qwen lacks.
    """
    everything = config.to_dict()
    for key in _UNSUPPORTED:
        if everything.get(key):
            raise ConfigError(f"{WHERE}: {key} is not supported in this version; leave it out")
    given = given_values(config)
    if "type" in given:
        given["type"] = "LlamaConfig"
    validate(_layout(given), WHERE)
    # Values at LlamaConfig's default count as well, now that the names are known to be right.
    known = frozenset(given) | frozenset(_baseline()[0]) - _baseline()[1] - SET_BY_MINDFORMERS
    values = {key: _plain(everything[key]) for key in known if everything.get(key) is not None}
    if int(values["vocab_size"]) > END_OF_TEXT:
        for key, foreign in _FOREIGN.items():
            if values.get(key) == foreign:
                values[key] = END_OF_TEXT
    elif "eos_token_id" not in given:
        values.pop("eos_token_id", None)  # a small vocabulary without a known end
    relevant = {key: value for key, value in values.items() if key in given or key in _READ}
    run = settings_from_mapping(_layout(relevant), WHERE)
    return ModelSettings(run.model, run, _generation(relevant, run))


_READ = frozenset(
    "vocab_size hidden_size num_layers num_heads intermediate_size seq_length max_position_embedding rms_norm_eps "
    "use_past batch_size block_size num_blocks do_sample top_k top_p repetition_penalty max_decode_length "
    "eos_token_id pad_token_id compute_dtype param_init_type".split()
)
_GENERATION = (
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "repetition_penalty",
    "max_length",
    "max_new_tokens",
)


def _generation(values: Mapping[str, Any], run: RunSettings) -> dict[str, Any]:
    chosen = {key: getattr(run, key) for key in _GENERATION if key in values}
    if "max_length" not in chosen and run.max_decode_length is not None:
        chosen["max_length"] = run.max_decode_length
    return {**chosen, "eos_token_id": list(run.eos_token_id), "pad_token_id": run.pad_token_id}


def _layout(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": {"model_config": dict(values)}}


def _plain(value: Any) -> Any:
    """Lists and mappings of MindFormers' own types as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
