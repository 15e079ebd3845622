"""A run from its recipe to its result: checks, the model in training, the loop around it, and what it leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.train import loop
from research.qwen.train.fingerprint import fingerprint
from research.qwen.train.options import LoopOptions, Outcome
from research.qwen.train.preparing import Prepared, check_memory, chosen_device, overview, prepare, warnings
from research.qwen.train.protocols import Ranks
from research.qwen.train.recipe import Recipe, changed
from research.qwen.train.results import publish, result_name, saver, written_bytes
from research.qwen.train.schedule import Schedule
from research.qwen.train.signals import StopSignals

if TYPE_CHECKING:
    from research.qwen.model.ascend_train_step import AscendTrainStep
    from research.qwen.model.train_step import TrainStep

# Settings that the loop records and compares itself.
_OF_THE_LOOP = frozenset("learning_rate schedule lr_end warmup_ratio warmup_steps accumulation".split())


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``result``: the folder with the adapter or model, of the best evaluation where there were any;
    None if it ended before its first checkpoint, or in a process that writes nothing."""

    outcome: Outcome
    result: Path | None

    @property
    def exit_code(self) -> int:
        """That of a command: 0, or 130 after Ctrl-C."""
        return self.outcome.exit_code


def run(
    recipe: Recipe,
    shape: QwenConfig | None = None,
    *,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    stop: StopSignals | None = None,
    stream: TextIO | None = None,
) -> Summary:
    """Train as the recipe says and leave OUTPUT/adapter or OUTPUT/model.

    ``shape``: the model, where no config.json beside the checkpoint tells it. ``tell`` gets the overview and warnings
    before the first step, a line each. ``force``: also if the memory will not do. ``stop`` as for ``loop.run``.
    Raises QwenError: what is wrong with recipe, checkpoint or data, or why the training ended.
    """
    world = _World.join(recipe)
    prepared = prepare(world.recipe, shape)
    if world.ranks.rank == 0:
        for line in overview(prepared):
            tell(line)
        for line in warnings(prepared):
            tell(f"warning: {line}")
    if prepared.device == "ascend":
        check_layout(prepared)
    if not force:
        check_memory(prepared)
    return train(prepared, world.ranks, world.exchange, stop, stream)


def train(
    run: Prepared,
    ranks: Ranks | None = None,
    exchange: Any = None,
    stop: StopSignals | None = None,
    stream: TextIO | None = None,
) -> Summary:
    """Load the weights and train what was prepared."""
    ranks, recipe = ranks or Ranks(), run.recipe
    rank = layout(recipe).data_rank(ranks.rank)  # of the copy of the model, which reads rows of its own
    step = open_step(run, exchange)
    outcome = loop.run(
        step,
        run.batches(rank, recipe.data_parallel),
        loop_options(recipe),
        recipe.output_dir,
        settings=settings(run),
        evaluation=run.held_out(rank, recipe.data_parallel),
        save_model=saver(run, step.trainable),
        model_bytes=written_bytes(run),
        resume=recipe.resume,
        ranks=ranks,
        stop=stop,
        stream=stream or sys.stderr,
    )
    best = outcome.best or outcome.latest
    if best is None or ranks.rank != 0:
        return Summary(outcome, None)
    return Summary(outcome, publish(best, recipe.output_dir / result_name(recipe)))


def open_step(run: Prepared, exchange: Any = None) -> TrainStep | AscendTrainStep:
    """The model in training: weights loaded, optimizer at its beginning."""
    from research.qwen.model.open_training import open_training

    recipe = run.recipe
    # Both are read from the environment where they are needed; DEVICE_ID is MindSpore's own.
    if recipe.threads:
        os.environ["QWEN_THREADS"] = str(recipe.threads)
    if recipe.device_id and recipe.world == 1:
        os.environ["DEVICE_ID"] = str(recipe.device_id)
    half = run.device == "ascend" and recipe.compute_dtype == "float16"
    return open_training(
        run.checkpoint.files[0] if len(run.checkpoint.files) == 1 else run.checkpoint.folder,
        run.config,
        recipe.method_spec(),
        recipe.optimizer_spec(scaled=half),
        compute_dtype=recipe.compute_dtype if run.device == "ascend" else "float32",
        backend=backend_name(run),
        seed=recipe.seed,
        recompute=recipe.recompute,
        exchange=exchange,
        layout=layout(recipe),
        packed=recipe.packing,
        length=recipe.max_length,
    )


def layout(recipe: Recipe) -> ParallelLayout:
    """How the model is spread over devices; on Ascend the micro batches of a step are parts of one graph."""
    pipelined = recipe.pipeline_stage > 1
    return ParallelLayout(
        data=recipe.data_parallel,
        model=recipe.model_parallel,
        stages=recipe.pipeline_stage,
        micro_batches=recipe.micro_batch_num if pipelined else recipe.accumulation,
        whole_embedding=recipe.vocab_emb_dp,
        optimizer=recipe.optimizer_parallel,
    )


def check_layout(run: Prepared) -> None:
    """ConfigError if the layout does not fit the model and a step, or asks for what several devices cannot do."""
    recipe = run.recipe
    rows = recipe.batch_size * recipe.accumulation * recipe.data_parallel
    layout(recipe).check(run.config, recipe.world, rows)
    if recipe.world > 1 and recipe.eval_data is not None:
        raise ConfigError(
            "on several Ascend devices there is no evaluation during training: leave eval_data out, and evaluate the "
            "checkpoints"
        )


def backend_name(run: Prepared) -> str:
    """The backend the recipe names, or that of the device."""
    return run.recipe.backend or run.device


def loop_options(recipe: Recipe) -> LoopOptions:
    """The recipe's part that the loop knows."""
    schedule = Schedule(
        lr=recipe.learning_rate,
        kind=recipe.schedule,
        warmup_ratio=recipe.warmup_ratio,
        warmup_steps=recipe.warmup_steps or None,
        min_ratio=recipe.lr_end / recipe.learning_rate,
    )
    return LoopOptions(
        schedule,
        epochs=recipe.epochs,
        max_steps=recipe.max_steps or None,
        accumulate=recipe.accumulation,
        eval_every=recipe.eval_steps or None,
        save_every=recipe.save_steps,
        log_every=recipe.log_steps,
        keep_last=recipe.keep,
        patience=recipe.early_stop or None,
        tensorboard=recipe.tensorboard,
    )


def settings(run: Prepared) -> dict[str, Any]:
    """What a resumed run must have in common with the one before, beside what the loop compares."""
    mattering = {name: value for name, value in run.recipe.curve().items() if name not in _OF_THE_LOOP}
    assert run.recipe.train_data is not None  # ``prepare`` asks for one
    return {
        **mattering,
        "base weights": fingerprint(*run.checkpoint.files),
        "training data": fingerprint(run.recipe.train_data),
        "samples": len(run.train),
        "tokens": run.train.survey().tokens,
    }


@dataclass(frozen=True)
class _World:
    """The processes of the run, and the recipe with their number in it."""

    recipe: Recipe
    ranks: Ranks
    exchange: Any

    @classmethod
    def join(cls, recipe: Recipe) -> _World:
        """Find the others where msrun started several; ConfigError if they are not as many as the recipe wants."""
        from research.qwen.model.parallel import join_world, started_by_msrun

        if not started_by_msrun():
            if recipe.world > 1:
                raise ConfigError(
                    f"the recipe is for {recipe.world} devices (parallel_config), but this is one process: start it "
                    "with scripts/msrun_finetune.sh, or set use_parallel: False"
                )
            return cls(recipe, Ranks(), None)
        world = join_world(chosen_device(recipe))
        if recipe.world == 1:
            recipe = changed(recipe, data_parallel=world.world)
        if recipe.world != world.world:
            raise ConfigError(
                f"the recipe is for {recipe.world} devices, but {world.world} processes were started; change "
                "parallel_config or the number of workers"
            )
        ranks = Ranks(world.rank, world.world, world.total)
        return cls(recipe, ranks, world)
