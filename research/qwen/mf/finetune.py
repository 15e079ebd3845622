"""``Trainer.finetune`` and ``Trainer.train`` for our model: the loop of the command ``finetune``, on the same recipe.

MindFormers' own training cannot run on CPU, loads a checkpoint that lacks tensors silently, accumulates no gradients on
one device and ignores misspelt keys. So for our model both methods read a recipe from the Trainer's configuration and
run ours; any other model goes through unchanged.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindformers import MindFormerConfig, Trainer

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError, RequestError
from research.qwen.mf.trainer import is_ours, use_device
from research.qwen.train.recipe import SETTINGS, Given, build
from research.qwen.train.recipe_file import RecipeFile, look_up, read_recipe, recipe_from_mapping
from research.qwen.train.runner import Summary, run

WHERE = "the Trainer's configuration"
# What templates and the Trainer itself add to the sections of a file.
_ADDED = {
    "train_dataset": ("auto_tune", "filepath_prefix", "autotune_per_step", "profile", "micro_batch_num"),
    "eval_dataset": ("auto_tune", "filepath_prefix", "autotune_per_step", "profile", "micro_batch_num"),
    "runner_config": ("initial_epoch", "initial_step", "origin_epochs"),
    "parallel_config": ("expert_model_parallel", "recompute"),
}
_NO_MEANING = (
    "auto_trans_ckpt",
    "src_strategy",
    "transform_process_num",
    "ignore_data_skip",
    "data_skip_steps",
)


def repair_finetune() -> None:
    """Install ours for our model; a second call changes nothing."""
    for name, checkpoint in (("finetune", "finetune_checkpoint"), ("train", "train_checkpoint")):
        original = getattr(Trainer, name)
        if not hasattr(original, "_qwen"):
            setattr(Trainer, name, _wrapped(original, checkpoint))


def _wrapped(original: Callable[..., Any], checkpoint: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        if not is_ours(self.config, self.model):
            return original(self, *args, **options)
        if args:
            options = {checkpoint: args[0], **options}
            if len(args) > 1:
                raise RequestError(f"{original.__name__}() takes one argument without a name, {checkpoint}")
        given = options.pop(checkpoint, None) or options.pop("resume_from_checkpoint", None)
        return finetune(self, given, **options)

    method._qwen = True  # type: ignore[attr-defined]
    return method


def finetune(
    trainer: Any,
    checkpoint: str | bool | None = None,
    resume_training: bool | str | None = None,
    resume_from_checkpoint: str | bool | None = None,
    do_eval: bool = False,
    **options: Any,
) -> Summary:
    """Train as the Trainer's configuration says; afterwards its ``predict`` answers with what was learned.

    Args:
        checkpoint: the model to start from; None: load_checkpoint of the configuration.
        resume_training: True: go on from the last checkpoint in output_dir; or the path of a checkpoint there.
        do_eval: needs an eval_dataset; with one, evaluation happens anyway.
        options: what else MindFormers' method takes; values that would have to mean something are refused.
    Raises:
        QwenError: what is wrong; nothing was trained then, or the last checkpoint is named.
    """
    _refuse(trainer, options)
    if isinstance(resume_from_checkpoint, str) and not checkpoint:
        checkpoint = resume_from_checkpoint
    if checkpoint is True:
        checkpoint, resume_training = None, resume_training or True
    file = _file(trainer)
    calls = {
        "model": checkpoint or None,
        "resume": resume_training or None,
        "method": getattr(trainer, "pet_method", None) or None,
    }
    given = [Given(name, value, f"{name} of the call") for name, value in calls.items() if value is not None]
    recipe = build(file.given, given)
    if do_eval and recipe.eval_data is None:
        raise RequestError("do_eval needs held-out data: give Trainer(eval_dataset=FILE)")
    use_device(recipe.device, recipe.device_id)
    summary = run(recipe, file.shape, tell=_tell)
    if summary.result is not None:
        _remember(trainer.config, str(summary.result), str(recipe.model))
    return summary


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _refuse(trainer: Any, options: Mapping[str, Any]) -> None:
    """What a caller may expect to work and would not."""
    for name, value in options.items():
        if name not in _NO_MEANING:
            raise RequestError(
                f"unknown option {name!r}; known: resume_training, do_eval, {', '.join(_NO_MEANING)}"
            )
        if value:
            raise RequestError(
                f"{name} has no meaning for this model: any checkpoint is read as it is; leave it out"
            )
    for name, why in (
        ("optimizers", "AdamW is set in the YAML file"),
        ("callbacks", "progress, checkpoints and reports come from the loop itself"),
        ("compute_metrics", "the evaluation loss is what is measured"),
    ):
        if getattr(trainer, name, None):
            raise RequestError(f"Trainer({name}=...) is not supported in training: {why}; leave it out")
    for name in ("train_dataset", "eval_dataset"):
        if getattr(trainer, name, None) is not None:
            raise RequestError(
                f"Trainer({name}=...) must be the path of a file (published JSON, messages JSONL, Alpaca, MindRecord), "
                f"got {type(getattr(trainer, name)).__name__}"
            )
    if trainer.is_model_instance:
        raise RequestError(
            "Trainer(model=instance) cannot be trained: give the YAML file as args, and the weights as "
            "finetune_checkpoint"
        )


def _file(trainer: Any) -> RecipeFile:
    """The recipe of the YAML file, checked strictly, under what was changed in ``trainer.config`` since; that of the
    configuration where no file was given."""
    now = _plain(trainer.config)
    if not isinstance(trainer.args, str | os.PathLike):
        return recipe_from_mapping(_sections(now), WHERE)
    path = Path(trainer.args)
    file = read_recipe(path)
    before = _plain(MindFormerConfig(str(path)))
    given = {one.name: one for one in file.given}
    for name, setting in SETTINGS.items():
        place = setting.metadata["place"]
        value = look_up(now, place)
        if value not in (None, "") and value != look_up(before, place):
            given[name] = Given(name, value, f"{WHERE}: {place}")
    return RecipeFile(list(given.values()), _shape(now) or file.shape, file.chat_format)


def _shape(config: Mapping[str, Any]) -> QwenConfig | None:
    model = look_up(config, "model.model_config")
    try:
        return QwenConfig.from_llama_dict({key: v for key, v in model.items() if v is not None})
    except ConfigError:
        return None


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a configuration that a recipe reads, without what MindFormers has added."""
    from research.qwen.settings import TOP_KEYS

    out = {key: value for key, value in config.items() if key in TOP_KEYS and value is not None}
    for section, added in _ADDED.items():
        if isinstance(out.get(section), Mapping):
            out[section] = {key: value for key, value in out[section].items() if key not in added}
    return out


def _plain(value: Any) -> Any:
    """MindFormers' mappings and configuration objects as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.to_dict()) if hasattr(value, "to_dict") else value


def _remember(config: Any, result: str, base: str) -> None:
    """Let predict load the result if it is asked for no other checkpoint, and find the vocabulary beside the base."""
    config.model.model_config.checkpoint_name_or_path = result
    config.resume_training = False
    tokenizer = look_up(config, "processor.tokenizer")
    if tokenizer is not None and not tokenizer.get("vocab_file"):
        folder = Path(base) if os.path.isdir(base) else Path(base).parent
        if (folder / "qwen.tiktoken").is_file():
            tokenizer.vocab_file = str(folder / "qwen.tiktoken")
