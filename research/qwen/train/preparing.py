"""Everything about a run that can be known before the first step: model, data, steps, memory. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, ConfigError, DataError, TrainingError, VocabularyError
from research.qwen.kernels.devices import resolve_device
from research.qwen.model.quantise import Plan, Source, quantised_source
from research.qwen.settings import load_settings
from research.qwen.text.tokenizer import QwenTokenizer, find_vocab_file
from research.qwen.train.batches import Batches
from research.qwen.train.data import DataOptions, Dataset, open_dataset
from research.qwen.train.memory import Estimate, device_memory, estimate, shown
from research.qwen.train.recipe import AS_STORED, PUBLISHED, Recipe, changed
from research.qwen.weights.adapters import is_adapter
from research.qwen.weights.companions import generation_config
from research.qwen.weights.readers import Checkpoint, open_checkpoint

Kind = Literal["base", "chat"]


@dataclass(frozen=True)
class Prepared:
    """A run whose recipe, checkpoint and data were checked against each other.

    ``kind``: base or chat, None if nothing says so. ``available``: bytes the device has for it, None if unknown.
    ``steps`` are optimizer steps of the whole run, ``rows`` rows of an epoch.
    """

    recipe: Recipe
    config: QwenConfig
    checkpoint: Checkpoint
    source: Source
    tokenizer: QwenTokenizer
    train: Dataset
    evaluation: Dataset | None
    device: str
    kind: Kind | None
    rows: int
    steps: int
    estimate: Estimate
    available: int | None

    @property
    def quantised(self) -> bool:
        """Whether the checkpoint itself holds integers."""
        return bool(self.source.formats)

    def options(self) -> DataOptions:
        """How conversations become samples."""
        return data_options(self.recipe)

    def batches(self, rank: int = 0, world: int = 1) -> Batches:
        """The training batches of one process."""
        return make_batches(self.recipe, self.train, self.tokenizer, rank, world)

    def held_out(self, rank: int = 0, world: int = 1) -> Batches | None:
        """The batches to evaluate with, in the order of the file."""
        if self.evaluation is None:
            return None
        return make_batches(self.recipe, self.evaluation, self.tokenizer, rank, world, shuffle=False)


def prepare(recipe: Recipe, shape: QwenConfig | None = None) -> Prepared:
    """Check everything that can be wrong before weights are loaded.

    ``shape`` is the model of the YAML file; a config.json beside the checkpoint wins over it.
    Raises CheckpointError: missing, damaged, or not covering the model. ConfigError, VocabularyError, DataError.
    """
    checkpoint, config = open_base(recipe.model, shape)
    source = quantised_source(checkpoint, config, Plan(), progress=False)  # refuses what does not fit
    check_method(recipe, source)
    if source.formats:
        recipe = changed(
            recipe, base_dtype=AS_STORED
        )  # qlora's int4 is for checkpoints that are not quantised
    if recipe.max_length > config.max_length:
        raise ConfigError(
            f"max_length {recipe.max_length} is more than the model can hold, {config.max_length} tokens"
        )
    tokenizer = _tokenizer(recipe, checkpoint, config)
    if recipe.train_data is None:
        raise DataError("no training data: give --train-data FILE, or train_dataset.data_loader.dataset_dir")
    train = open_dataset(recipe.train_data, tokenizer, data_options(recipe), recipe.skip_bad)
    held_out = None
    if recipe.eval_data is not None:
        held_out = open_dataset(recipe.eval_data, tokenizer, data_options(recipe), recipe.skip_bad)
        held_out.survey()
    batches = make_batches(recipe, train, tokenizer, 0, recipe.data_parallel)
    per_epoch = -(-batches.steps_per_epoch // recipe.accumulation)
    device = chosen_device(recipe)
    check_device(recipe, device, bool(source.formats))
    return Prepared(
        recipe,
        config,
        checkpoint,
        source,
        tokenizer,
        train,
        held_out,
        device,
        model_kind(recipe, checkpoint.folder),
        rows=len(batches.rows),
        steps=recipe.max_steps or recipe.epochs * per_epoch,
        estimate=estimate(config, recipe, device, source.format("transformer.h.0.attn.c_attn")),
        available=device_memory(device, recipe.device_memory),
    )


def open_base(path: Path | None, shape: QwenConfig | None) -> tuple[Checkpoint, QwenConfig]:
    """The checkpoint to start from and the shape of its model: config.json beside it, else the YAML named like a
    weights file, else ``shape``."""
    if path is None:
        raise CheckpointError(
            "no model to start from: give --model FOLDER, or load_checkpoint in the YAML file"
        )
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    if is_adapter(path):
        raise CheckpointError(
            f"{path} is an adapter, not a model; merge it into its base first (command merge), or resume its run"
        )
    checkpoint = open_checkpoint(path)
    if (checkpoint.folder / "config.json").is_file():
        return checkpoint, QwenConfig.from_folder(checkpoint.folder)
    beside = path.with_suffix(".yaml")
    if path.is_file() and beside.is_file():
        return checkpoint, load_settings(beside).model
    if shape is None:
        raise ConfigError(f"{path}: no config.json beside it says which model this is; give --config YAML")
    return checkpoint, shape


def check_method(recipe: Recipe, source: Source) -> None:
    """ConfigError if the method and the checkpoint's number formats do not go together."""
    quantised = sorted(set(source.formats.values()))
    if quantised and recipe.method == "full":
        raise ConfigError(
            f"the checkpoint is quantised ({', '.join(quantised)}), and integers cannot be trained: use method qlora, "
            "or the original checkpoint"
        )
    if quantised and recipe.base_dtype not in (AS_STORED, *quantised, PUBLISHED["qlora"]["base_dtype"]):
        raise ConfigError(
            f"base_dtype is {recipe.base_dtype}, but the checkpoint holds {', '.join(quantised)}; leave it out"
        )
    if recipe.method == "qlora" and not quantised and recipe.base_dtype == AS_STORED:
        raise ConfigError("qlora needs base_dtype int4 or int8, or a checkpoint that is quantised")


def check_device(recipe: Recipe, device: str, quantised: bool) -> None:
    """ConfigError for what a device cannot do."""
    if device == "ascend" and (recipe.method == "qlora" or quantised) and recipe.world > 1:
        raise ConfigError(
            "quantised weights are trained beside on one Ascend device only: set every number in parallel_config to 1, "
            "or use method lora on the original checkpoint"
        )
    if device == "ascend" and recipe.compute_dtype == "float32":
        raise ConfigError("on ascend training computes in float16 (910A) or bfloat16 (910B), not float32")
    if device == "ascend" and recipe.world > 1 and recipe.eval_data is not None:
        raise ConfigError(
            "on several Ascend devices there is no evaluation during training in this version: leave eval_data out and "
            "evaluate the checkpoints"
        )
    if device == "cpu" and (
        recipe.model_parallel > 1 or recipe.pipeline_stage > 1 or recipe.optimizer_parallel
    ):
        raise ConfigError(
            "model_parallel, pipeline_stage and optimizer_parallel need ascend; on CPU there is data_parallel only"
        )


def model_kind(recipe: Recipe, folder: Path) -> Kind | None:
    """base or chat: what the recipe says, else chat_format in generation_config.json; never the folder's name."""
    if recipe.model_kind != "auto":
        return recipe.model_kind
    kinds: dict[object, Kind] = {"chatml": "chat", "raw": "base"}
    return kinds.get(generation_config(folder).get("chat_format"))


def data_options(recipe: Recipe) -> DataOptions:
    """How conversations become samples."""
    return DataOptions(recipe.max_length, recipe.mask, recipe.specials, recipe.truncation, recipe.system)


def make_batches(
    recipe: Recipe, dataset: Dataset, tokenizer: QwenTokenizer, rank: int, world: int, shuffle: bool = True
) -> Batches:
    """Batches of a dataset as the recipe wants them."""
    return Batches(
        dataset,
        recipe.batch_size,
        recipe.max_length,
        seed=recipe.seed,
        packing=recipe.packing and shuffle,
        rank=rank,
        world=world,
        pad=recipe.pad,
        shuffle=shuffle and recipe.shuffle,
        pad_id=tokenizer.eod_id,
    )


def _tokenizer(recipe: Recipe, checkpoint: Checkpoint, config: QwenConfig) -> QwenTokenizer:
    tokenizer = QwenTokenizer(find_vocab_file(recipe.vocab_file, checkpoint.folder))
    if len(tokenizer) > config.vocab_size:
        raise VocabularyError(
            f"{tokenizer.vocab_file} has {len(tokenizer)} tokens, the model only {config.vocab_size} rows: not its "
            "vocabulary; give --vocab-file"
        )
    return tokenizer


def chosen_device(recipe: Recipe) -> str:
    """cpu or ascend: what the recipe says, or what is there."""
    if recipe.backend is not None:
        return "ascend" if recipe.backend == "ascend" else "cpu"
    return resolve_device(recipe.device.lower())


# ---- what the user is told ----


def overview(run: Prepared) -> list[str]:
    """Lines before the first step: what is trained, on what, for how long, and the memory it takes."""
    recipe, found = run.recipe, run.estimate
    survey = run.train.survey()
    share = found.trainable / (found.parameters + (found.trainable if recipe.method != "full" else 0))
    lines = [
        f"model       {recipe.model}: {run.kind or 'base or chat unknown'}, {_count(found.parameters)} parameters",
        f"method      {_method(recipe)}: {_count(found.trainable)} trainable ({share:.2%} of all)",
        f"data        {recipe.train_data}: {len(run.train):,} samples, {survey.tokens:,} tokens an epoch, of which "
        f"{survey.trained_tokens:,} are learned",
        f"steps       {run.steps:,} of {_per_step(recipe)} rows"
        f"{f', {recipe.epochs} epochs' if not recipe.max_steps else ''}"
        f"{f', {run.rows:,} packed rows an epoch' if recipe.packing else ''}",
        f"memory      estimated peak {shown(found.total)} (weights {shown(found.weights)}, gradients "
        f"{shown(found.gradients)}, AdamW {shown(found.optimizer)}, activations {shown(found.activations)}) of "
        f"{shown(run.available) + ' there are' if run.available is not None else 'an unknown amount'} on {run.device}",
        f"output      {recipe.output_dir}",
    ]
    if run.evaluation is not None:
        lines.insert(3, f"evaluation  {recipe.eval_data}: {len(run.evaluation):,} samples")
    return lines


def warnings(run: Prepared) -> list[str]:
    """What the user should know and may not want; a sentence each."""
    found = run.train.survey().warnings(run.options())
    recipe, whole = run.recipe, set(run.recipe.modules_to_save)
    if recipe.max_length > run.config.seq_length:
        found.append(
            f"max_length {recipe.max_length} is longer than the model was trained for ({run.config.seq_length}); in "
            "training there is no NTK"
        )
    if recipe.method == "full":
        return found
    if run.kind == "base" and whole != {"wte", "lm_head"}:
        found.append(
            "a base model has never seen <|im_start|> and <|im_end|>, which LoRA beside the layers cannot teach it: "
            "train its embeddings too (--modules-to-save wte lm_head)"
        )
    elif run.kind == "chat" and whole:
        found.append(
            f"a chat model knows its control tokens; without modules_to_save {' '.join(sorted(whole))} there is less "
            "to train and to hold in memory"
        )
    elif run.kind is None and not whole:
        found.append(
            "nothing says whether this is a base or a chat model (generation_config.json has no chat_format; "
            "--model-kind does): a base model also needs --modules-to-save wte lm_head"
        )
    return found


def check_memory(run: Prepared) -> None:
    """TrainingError if the estimate is more than the device has."""
    if run.available is None or run.estimate.total <= run.available:
        return
    recipe = run.recipe
    ways = [
        *(["--recompute"] if not recipe.recompute else []),
        *(["--batch-size 1 with more --accumulation"] if recipe.batch_size > 1 else []),
        *(["a shorter --max-length"] if recipe.max_length > 256 else []),
        {"full": "--method lora", "lora": "--method qlora", "qlora": "a smaller --lora-rank"}[recipe.method],
    ]
    raise TrainingError(
        f"the run needs about {shown(run.estimate.total)}, but {run.device} has {shown(run.available)}: try "
        f"{', '.join(ways)}; --force starts it all the same"
    )


def _method(recipe: Recipe) -> str:
    if recipe.method == "full":
        return "full"
    whole = f", whole {' '.join(recipe.modules_to_save)}" if recipe.modules_to_save else ""
    base = f" over {recipe.base_dtype}" if recipe.method == "qlora" else ""
    return f"{recipe.method}{base} (rank {recipe.lora_rank}, alpha {recipe.lora_alpha:g}{whole})"


def _per_step(recipe: Recipe) -> str:
    parts = [str(recipe.batch_size), str(recipe.accumulation)]
    parts += [str(recipe.data_parallel)] if recipe.data_parallel > 1 else []
    return " x ".join(parts)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
