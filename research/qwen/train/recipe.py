"""All settings of a fine-tuning run in one frozen value, each with its check, its place in YAML and its help.

The defaults are those of the published LoRA recipe. A field's metadata says where MindFormers' YAML layout keeps it
(``recipe_file``) and what its command-line option says (``cli/finetune``), so a setting is added in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from research.qwen.checks import Check, boolean, check_value, integer, number, one_of, text
from research.qwen.config import suggest
from research.qwen.errors import ConfigError
from research.qwen.model.training_specs import AS_STORED, METHODS, TARGETS, MethodSpec, OptimizerSpec
from research.qwen.quant.schemes import Scheme

MODULES = ("wte", "lm_head")  # those an adapter can hold
# What the published scripts say per method, where they differ from each other.
PUBLISHED: dict[str, dict[str, Any]] = {
    "full": {
        "learning_rate": 1e-5,
        "lr_end": 0.0,
        "batch_size": 1,
        "accumulation": 16,
        "base_dtype": AS_STORED,
    },
    "lora": {
        "learning_rate": 3e-4,
        "lr_end": 0.0,
        "batch_size": 2,
        "accumulation": 8,
        "base_dtype": AS_STORED,
    },
    "qlora": {"learning_rate": 3e-4, "lr_end": 0.0, "batch_size": 2, "accumulation": 8, "base_dtype": "int4"},
}
# MindFormers' name of a schedule -> ours.
SCHEDULES = {
    "CosineWithWarmUpLR": "cosine",
    "LinearWithWarmUpLR": "linear",
    "ConstantWarmUpLR": "constant",
}


def _names(*allowed: str) -> Check:
    def check(value: Any) -> str | None:
        listed = value if isinstance(value, list | tuple) else [value]
        wrong = [one for one in listed if one not in allowed]
        if not wrong:
            return None
        return f"a list of {', '.join(allowed)}{suggest(str(wrong[0]), list(allowed))}"

    return check


def _path(value: Any) -> str | None:
    return None if isinstance(value, str | Path) and str(value) else "a path"


def _base_dtype(value: Any) -> str | None:
    try:
        fits = value == AS_STORED or bool(Scheme.parse(str(value)))
    except ConfigError:
        fits = False
    return None if fits else f"{AS_STORED!r}, int8, int4, int4-g64, ..."


def _resume(value: Any) -> str | None:
    return None if isinstance(value, bool | str | Path) else "True, 'latest' or the path of a checkpoint"


def setting(
    default: Any, place: str, check: Check, about: str, *, curve: bool = True, option: bool = True
) -> Any:
    """A field of Recipe. ``place``: dotted path in YAML (a number is an index, a name in a list an entry's type).

    ``curve``: a run cannot be resumed with another value, because its losses would be others.
    """
    meta = {"place": place, "check": check, "about": about, "curve": curve, "option": option}
    return field(default=default, metadata=meta)


_POSITIVE = number(0, open_low=True)
_SHARE = number(0, 1)
_OWN = "finetune"
_SAVE = "callbacks.CheckpointMonitor"


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; see each field's metadata for its meaning.

    Lengths are in tokens, cadences in optimizer steps, ``loss_scale`` concerns float16 only. Empty ``train_data`` and
    ``model`` are allowed here and refused when the run starts. Raises ConfigError naming the setting.
    """

    model: Path | None = setting(
        None, "load_checkpoint", _path, "checkpoint to start from: folder or file", curve=False, option=False
    )
    train_data: Path | None = setting(
        None, "train_dataset.data_loader.dataset_dir", _path, "conversations to learn from", curve=False
    )
    eval_data: Path | None = setting(
        None, "eval_dataset.data_loader.dataset_dir", _path, "held-out conversations", curve=False
    )
    output_dir: Path = setting(
        Path("output"), "output_dir", _path, "folder for checkpoints and reports", curve=False, option=False
    )
    resume: str | Path | None = setting(
        None,
        "resume_training",
        _resume,
        "latest, best, auto (latest if there is one) or a checkpoint",
        curve=False,
    )
    seed: int = setting(42, "seed", integer(0), "of the order of samples, dropout and new matrices")

    method: Literal["full", "lora", "qlora"] = setting(
        "lora", f"{_OWN}.method", one_of(*METHODS), "full, lora or qlora"
    )
    lora_rank: int = setting(64, f"{_OWN}.lora_rank", integer(1), "rank of the added matrices")
    lora_alpha: float = setting(16, f"{_OWN}.lora_alpha", _POSITIVE, "their weight is alpha / rank")
    lora_dropout: float = setting(0.05, f"{_OWN}.lora_dropout", number(0, 0.99), "share of inputs dropped")
    lora_targets: tuple[str, ...] = setting(
        ("c_attn", "c_proj", "w1", "w2"),
        f"{_OWN}.lora_targets",
        _names(*TARGETS),
        "matrices that get them: published names, or attention, mlp, all",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), f"{_OWN}.modules_to_save", _names(*MODULES), "modules trained whole beside LoRA: wte lm_head"
    )
    base_dtype: str = setting(
        AS_STORED, f"{_OWN}.base_dtype", _base_dtype, "numbers of the frozen weights: int4 or int8 for qlora"
    )
    model_kind: Literal["auto", "base", "chat"] = setting(
        "auto",
        f"{_OWN}.model_kind",
        one_of("auto", "base", "chat"),
        "base or chat; auto: the checkpoint's generation_config.json decides",
        curve=False,
    )

    learning_rate: float = setting(3e-4, "lr_schedule.learning_rate", _POSITIVE, "highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "lr_schedule.type", one_of(*SCHEDULES.values()), "cosine, linear or constant after warm-up"
    )
    lr_end: float = setting(0.0, "lr_schedule.lr_end", number(0), "learning rate at the end")
    warmup_ratio: float = setting(0.01, "lr_schedule.warmup_ratio", _SHARE, "share of steps for warm-up")
    warmup_steps: int = setting(
        0, "lr_schedule.warmup_steps", integer(0), "steps of warm-up; 0: by the ratio"
    )
    beta1: float = setting(0.9, "optimizer.betas.0", number(0, 0.999999), "AdamW: mean of gradients")
    beta2: float = setting(0.95, "optimizer.betas.1", number(0, 0.999999), "AdamW: mean of their squares")
    eps: float = setting(1e-8, "optimizer.eps", _POSITIVE, "AdamW: epsilon")
    weight_decay: float = setting(0.1, "optimizer.weight_decay", number(0), "AdamW: weight decay")
    decay: Literal["published", "all"] = setting(
        "published",
        f"{_OWN}.decay",
        one_of("published", "all"),
        "published: not for biases; all: for every parameter",
    )
    clip_norm: float = setting(1.0, "runner_wrapper.max_grad_norm", number(0), "longest gradient; 0: any")
    loss_scale: float = setting(
        65536.0, "runner_wrapper.scale_sense.loss_scale_value", number(1), "first loss scale (float16)"
    )
    loss_scale_window: int = setting(
        1000, "runner_wrapper.scale_sense.scale_window", integer(1), "steps until it grows (float16)"
    )

    batch_size: int = setting(2, "runner_config.batch_size", integer(1), "rows of a micro batch")
    accumulation: int = setting(
        8, "runner_config.gradient_accumulation_steps", integer(1), "micro batches of an optimizer step"
    )
    epochs: int = setting(5, "runner_config.epochs", integer(1), "passes over the data", curve=False)
    max_steps: int = setting(
        0, f"{_OWN}.max_steps", integer(0), "stop after so many steps; 0: by epochs", curve=False
    )

    max_length: int = setting(512, f"{_OWN}.max_length", integer(8), "longest row in tokens")
    mask: Literal["published", "assistant"] = setting(
        "published", f"{_OWN}.mask", one_of("published", "assistant"), "which tokens are learned"
    )
    specials: Literal["published", "text"] = setting(
        "published", f"{_OWN}.specials", one_of("published", "text"), "text: contents never give control ids"
    )
    truncation: Literal["published", "turns"] = setting(
        "published", f"{_OWN}.truncation", one_of("published", "turns"), "turns: keep whole turns"
    )
    system: str = setting(
        "You are a helpful assistant.", f"{_OWN}.system", text, "system message where a sample has none"
    )
    packing: bool = setting(False, f"{_OWN}.packing", boolean, "several short samples in one row")
    pad: Literal["multiple", "max"] = setting(
        "multiple", f"{_OWN}.pad", one_of("multiple", "max"), "rows as long as needed, or max: max_length"
    )
    shuffle: bool = setting(True, "train_dataset.data_loader.shuffle", boolean, "new order each epoch")
    skip_bad: bool = setting(False, f"{_OWN}.skip_bad", boolean, "leave bad samples out instead of stopping")

    compute_dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "float16",
        "model.model_config.compute_dtype",
        one_of("float32", "float16", "bfloat16"),
        "on ascend: float16 (910A) or bfloat16 (910B); on cpu all is float32",
    )
    recompute: bool = setting(
        True, "recompute_config.recompute", boolean, "compute activations twice, keep few", curve=False
    )
    flash_attention: bool = setting(
        True, "model.model_config.use_flash_attention", boolean, "fused attention (ascend)"
    )
    backend: str | None = setting(
        None,
        f"{_OWN}.backend",
        one_of("cpu", "reference", "ascend"),
        "cpu, reference or ascend",
    )
    device: Literal["auto", "CPU", "Ascend"] = setting(
        "auto", "context.device_target", one_of("auto", "CPU", "Ascend"), "auto, CPU or Ascend", curve=False
    )
    device_id: int = setting(0, "context.device_id", integer(0), "which NPU", curve=False)
    device_memory: str | None = setting(
        None, "context.max_device_memory", text, "memory the run may use, such as 58GB", curve=False
    )
    threads: int = setting(0, f"{_OWN}.threads", integer(0), "CPU threads; 0: all", curve=False)
    vocab_file: Path | None = setting(
        None, "processor.tokenizer.vocab_file", _path, "qwen.tiktoken, if it is not beside the checkpoint"
    )

    log_steps: int = setting(
        1,
        "callbacks.MFLossMonitor.per_print_times",
        integer(1),
        "steps between lines of the log",
        curve=False,
    )
    save_steps: int = setting(
        1000, f"{_SAVE}.save_checkpoint_steps", integer(1), "steps between checkpoints", curve=False
    )
    keep: int = setting(
        10, f"{_SAVE}.keep_checkpoint_max", integer(1), "checkpoints kept beside the best", curve=False
    )
    eval_steps: int = setting(
        0, "eval_step_interval", integer(0), "steps between evaluations; 0: once an epoch", curve=False
    )
    early_stop: int = setting(
        0,
        f"{_OWN}.early_stop",
        integer(0),
        "evaluations without a better loss until it ends; 0: off",
        curve=False,
    )
    tensorboard: bool = setting(
        True, f"{_OWN}.tensorboard", boolean, "write events for TensorBoard", curve=False
    )

    data_parallel: int = setting(1, "parallel_config.data_parallel", integer(1), "copies of the model")
    model_parallel: int = setting(1, "parallel_config.model_parallel", integer(1), "parts of a matrix")
    pipeline_stage: int = setting(1, "parallel_config.pipeline_stage", integer(1), "groups of layers")
    micro_batch_num: int = setting(1, "parallel_config.micro_batch_num", integer(1), "rows in the pipeline")
    vocab_emb_dp: bool = setting(
        True,
        "parallel_config.vocab_emb_dp",
        boolean,
        "every device has the whole embedding, also where matrices are split",
    )
    optimizer_parallel: bool = setting(
        False, "parallel.enable_parallel_optimizer", boolean, "AdamW's state split over the copies"
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            check_value(one.name, getattr(self, one.name), one.metadata["check"], "recipe")
        problem = self._contradiction()
        if problem:
            raise ConfigError(f"recipe: {problem}")

    def _contradiction(self) -> str | None:
        if self.method == "full" and self.base_dtype != AS_STORED:
            return f"method full trains every weight, so base_dtype {self.base_dtype} has no place; use qlora"
        if self.method != "full" and not self.lora_targets:
            return "lora_targets is empty; name matrices, or all"
        if self.early_stop and self.eval_data is None:
            return "early_stop needs eval_data, by whose loss it decides"
        if self.lr_end > self.learning_rate:
            return f"lr_end {self.lr_end:g} is above learning_rate {self.learning_rate:g}"
        if self.lr_end and self.schedule == "constant":
            return f"lr_end {self.lr_end:g} has no meaning with a constant learning rate"
        if self.pipeline_stage > 1 and self.micro_batch_num < self.pipeline_stage:
            return f"micro_batch_num {self.micro_batch_num} is below pipeline_stage {self.pipeline_stage}"
        return None

    @property
    def world(self) -> int:
        """Devices of the run."""
        return self.data_parallel * self.model_parallel * self.pipeline_stage

    def method_spec(self) -> MethodSpec:
        """What is trained, for the model."""
        return MethodSpec(
            kind=self.method,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.lora_targets,
            modules_to_save=self.modules_to_save,
            base=self.base_dtype,
        )

    def optimizer_spec(self, scaled: bool) -> OptimizerSpec:
        """How it is trained; ``scaled``: the computation is float16 and needs a loss scale."""
        return OptimizerSpec(
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decay=self.decay,
            clip_norm=self.clip_norm or None,
            loss_scale=self.loss_scale if scaled else None,
            loss_scale_window=self.loss_scale_window,
        )

    def curve(self) -> dict[str, Any]:
        """The settings the losses depend on, as JSON values: a run is resumed with the same ones only. Files are not
        among them: what they hold counts, not where they are."""
        return {name: _plain(getattr(self, name)) for name, one in SETTINGS.items() if one.metadata["curve"]}

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}


SETTINGS: Mapping[str, Field[Any]] = {one.name: one for one in fields(Recipe)}


@dataclass(frozen=True)
class Given:
    """A value of a setting and how its giver calls it, for errors: ``x.yaml: optimizer.eps`` or ``--eps``."""

    name: str
    value: Any
    where: str


def build(file: list[Given], options: list[Given] = []) -> Recipe:  # noqa: B006  (never changed)
    """A Recipe of a file's settings with the options of a command over them.

    What neither gives follows the published recipe of the method; options that change the file's method also bring
    that method's published values, unless they are options themselves. Raises ConfigError naming file and key path.
    """
    values: dict[str, Any] = {}
    for layer in (file, options):
        given = {one.name: converted(one) for one in layer if one.value is not None}
        method = given.get("method", values.get("method", "lora"))
        if method != values.get("method"):
            values |= {name: value for name, value in PUBLISHED[method].items() if name not in given}
        values |= given
    wheres = sorted({one.where.partition(": ")[0] for one in file if ": " in one.where})
    try:
        return Recipe(**values)
    except ConfigError as error:
        raise ConfigError(str(error).replace("recipe", wheres[0], 1) if wheres else str(error)) from None


def converted(given: Given) -> Any:
    """The value in its field's type; ConfigError if it is not what the setting wants."""
    meta = SETTINGS[given.name].metadata
    value = given.value
    if given.name == "schedule":
        value = SCHEDULES.get(value, value)
    complaint = meta["check"](value)
    if complaint:
        raise ConfigError(f"{given.where} must be {complaint}, got {given.value!r}")
    if given.name == "resume":
        return {True: "latest", False: None}.get(value, value) if isinstance(value, bool) else value
    kind = SETTINGS[given.name].type
    if "float" in str(kind) and "Literal" not in str(kind):
        return float(value)
    if str(kind).startswith("tuple"):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return Path(value).expanduser() if str(kind).startswith("Path") else value


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """A copy with some settings replaced; checked again."""
    return replace(recipe, **values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
