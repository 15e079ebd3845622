"""A recipe from YAML: MindFormers' sections where it has a place for a setting, ours (``finetune``) for the rest.

Every key of the sections for training is known by name, as in settings.py: MindFormers itself ignores a misspelt one.
What only its own training loop reads (data columns, workers, ...) is accepted and means nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.qwen.checks import check_key
from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.settings import read_yaml, resolve, settings_from_mapping
from research.qwen.train.recipe import SCHEDULES, SETTINGS, Given

PATHS = ("model", "train_data", "eval_data", "vocab_file")
_PET = "model.model_config.pet_config"
# Where MindFormers itself keeps these; ours is the section ``finetune``, which a shared file can hold.
_PET_PLACES = {
    "method": f"{_PET}.pet_type",
    "lora_rank": f"{_PET}.lora_rank",
    "lora_alpha": f"{_PET}.lora_alpha",
    "lora_dropout": f"{_PET}.lora_dropout",
    "lora_targets": f"{_PET}.target_modules",
}
_PLACES = {name: one.metadata["place"] for name, one in SETTINGS.items()}
# Section -> keys of MindFormers that may stand in it beside the settings.
_DATASET = (
    "data_loader tokenizer input_columns output_columns num_parallel_workers python_multiprocessing drop_remainder "
    "batch_size repeat numa_enable prefetch_size seed do_eval mixup_op max_length"
)
_LOADER = "type dataset_dir shuffle"
_OTHERS: dict[str, str] = {
    "finetune": "",
    "optimizer": "type betas learning_rate",
    "lr_schedule": "total_steps warmup_lr_init num_cycles",
    "runner_wrapper": "type use_clip_grad scale_sense local_norm",
    "runner_wrapper.scale_sense": "type scale_factor",
    "runner_config": "sink_mode sink_size num_classes stop_step",
    "recompute_config": "select_recompute parallel_optimizer_comm_recompute select_comm_recompute mp_comm_recompute "
    "recompute_slice_activation select_recompute_exclude select_comm_recompute_exclude",
    "parallel_config": "context_parallel expert_parallel seq_split_num use_seq_parallel optimizer_shard "
    "gradient_aggregation_group vocab_emb_dp context_parallel_algo ulysses_degree_in_cp mem_coeff auto_parallel",
    "parallel": "parallel_mode full_batch search_mode gradients_mean enable_alltoall strategy_ckpt_save_file "
    "strategy_ckpt_config parallel_optimizer_config dataset_strategy loss_repeated_mean pipeline_config",
    "train_dataset": _DATASET,
    "train_dataset.data_loader": _LOADER,
    "eval_dataset": _DATASET,
    "eval_dataset.data_loader": _LOADER,
    _PET: "pet_type lora_rank lora_alpha lora_dropout target_modules lora_a_init lora_b_init param_init_type "
    "compute_dtype exclude_layers",
}
_CALLBACKS = {
    "MFLossMonitor": "per_print_times",
    "CheckpointMonitor": "save_checkpoint_steps keep_checkpoint_max prefix directory integrated_save async_save "
    "save_network_params save_trainable_params save_optimizer remove_redundancy checkpoint_format",
    "ObsMonitor": "",
    "EvalCallBack": "",
    "SummaryMonitor": "",
    "ProfileMonitor": "start_step stop_step start_profile",
}
# MindFormers' LoRA takes a pattern of its own names of matrices.
_PATTERN = "target_modules holds published names (c_attn, c_proj, w1, w2, attention, mlp, all), no pattern"


@dataclass(frozen=True)
class RecipeFile:
    """What a YAML file says about a run: settings as given, and the model's shape."""

    given: list[Given]
    shape: QwenConfig
    chat_format: str | None


def read_recipe(path: str | Path) -> RecipeFile:
    """Read a YAML file and what it inherits; ConfigError names the file, the key path and what to write instead."""
    path = Path(path)
    return recipe_from_mapping(read_yaml(path), str(path), path.parent)


def recipe_from_mapping(raw: Any, where: str, folder: Path | None = None) -> RecipeFile:
    """The same of a mapping that is already read; ``folder`` is where relative paths are looked for first."""
    settings = settings_from_mapping(raw, where, folder)
    check_sections(raw, where)
    given = []
    alone = not raw.get("use_parallel")
    for name, place in _PLACES.items():
        value, place = _value(raw, name, place, where)
        if value is None or value == "" or (alone and place.startswith("parallel")):
            continue
        if name in PATHS:
            value = resolve(str(value), folder)
        given.append(Given(name, value, f"{where}: {place}"))
    if look_up(raw, "runner_wrapper.use_clip_grad") is False:
        given.append(Given("clip_norm", 0.0, f"{where}: runner_wrapper.use_clip_grad"))
    if all(one.name != "method" for one in given):  # as for MindFormers: without a pet_config all is trained
        given.append(Given("method", "full", f"{where}: finetune.method"))
    chat_format = look_up(raw, "model.model_config.chat_format")
    return RecipeFile(given, settings.model, chat_format)


def _value(raw: Any, name: str, place: str, where: str) -> tuple[Any, str]:
    """A setting's value and where it stands; ConfigError if it stands in two places and differs."""
    value, other = look_up(raw, place), _PET_PLACES.get(name)
    second = look_up(raw, other) if other else None
    if second is None or second == value:
        return value, place
    if value is not None:
        raise ConfigError(f"{where}: {place} is {value!r}, but {other} is {second!r}; give one of them")
    return second, str(other)


def look_up(raw: Any, place: str) -> Any:
    """The value at a dotted path, or None. In a list a number is an index, a name an entry's ``type``."""
    for part in place.split("."):
        if isinstance(raw, list | tuple):
            entries = {str(number): one for number, one in enumerate(raw)}
            entries |= {one["type"]: one for one in raw if isinstance(one, Mapping) and "type" in one}
            raw = entries
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def check_sections(raw: Mapping[str, Any], where: str) -> None:
    """ConfigError on the first key of a training section that is not known, or value that cannot be kept."""
    for section, others in _OTHERS.items():
        content = look_up(raw, section)
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{where}: {section} must be a mapping of keys to values, found {type(content).__name__}"
            )
        known = [*_own_keys(section), *others.split()]
        for key in content:
            check_key(f"{section}.{key}", str(key), dict.fromkeys(known), where)
    _check_callbacks(raw.get("callbacks"), where)
    _check_fixed(raw, where)


def _own_keys(section: str) -> Iterator[str]:
    for place in _PLACES.values():
        before, _, key = place.rpartition(".")
        if before == section:
            yield key


def _check_callbacks(callbacks: Any, where: str) -> None:
    if callbacks is None:
        return
    if not isinstance(callbacks, list) or not all(isinstance(one, Mapping) for one in callbacks):
        raise ConfigError(f"{where}: callbacks must be a list of mappings with a type each")
    for one in callbacks:
        name = str(one.get("type"))
        check_key(f"callbacks.{name}", name, _CALLBACKS, where)
        for key in one:
            known = dict.fromkeys(["type", *_CALLBACKS[name].split()])
            check_key(f"callbacks.{name}.{key}", str(key), known, where)


def _check_fixed(raw: Mapping[str, Any], where: str) -> None:
    """Values that would have to mean something, and do not here."""
    kind = look_up(raw, "optimizer.type")
    if kind not in (None, "AdamW"):
        raise ConfigError(f"{where}: optimizer.type must be 'AdamW', the published optimizer, got {kind!r}")
    schedule = look_up(raw, "lr_schedule.type")
    if schedule not in (None, *SCHEDULES, *SCHEDULES.values()):
        raise ConfigError(
            f"{where}: lr_schedule.type must be one of {', '.join(SCHEDULES)}, got {schedule!r}"
        )
    steps = look_up(raw, "lr_schedule.total_steps")
    if steps not in (None, -1):
        raise ConfigError(
            f"{where}: lr_schedule.total_steps must be -1 (all steps of the run), got {steps!r}; shorten the run "
            "with finetune.max_steps"
        )
    factor = look_up(raw, "runner_wrapper.scale_sense.scale_factor")
    if factor not in (None, 2):
        raise ConfigError(f"{where}: runner_wrapper.scale_sense.scale_factor must be 2, got {factor!r}")
    targets = look_up(raw, f"{_PET}.target_modules")
    if isinstance(targets, str) and ("*" in targets or "|" in targets):
        raise ConfigError(f"{where}: {_PET}.{_PATTERN}, got {targets!r}")
