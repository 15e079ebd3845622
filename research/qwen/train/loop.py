"""The training loop: steps, evaluation, checkpoints, early stop, signals and reports around any TrainStep.

It computes nothing itself: the model's step, the data and the sums over processes come as protocols, so the loop runs
and is tested without MindSpore. A resumed run continues the same course bit by bit: all it depends on is in the
checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError, DataError, QwenError, TrainingError
from research.qwen.train.checkpoints import (
    Checkpoints,
    Saved,
    SaveModel,
    differences,
    load_checkpoint,
    plain,
    refuse_changes,
)
from research.qwen.train.guard import check_evaluation, check_overflow, check_result
from research.qwen.train.history import Evaluation, History, Record
from research.qwen.train.options import FREE, LoopOptions, LoopState, Outcome
from research.qwen.train.progress import Display, clock, display
from research.qwen.train.protocols import PADDING, Batch, Batches, Ranks, TrainStep
from research.qwen.train.report import Report, summarise
from research.qwen.train.signals import StopSignals

CHECKPOINTS = "checkpoints"  # folder of the checkpoints in the output folder
MODEL, HISTORY = "model/", "history/"  # how the names of their arrays begin


def run(
    step: TrainStep,
    batches: Batches,
    options: LoopOptions,
    output: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    evaluation: Batches | None = None,
    save_model: SaveModel | None = None,
    model_bytes: int = 0,
    resume: str | Path | None = None,
    ranks: Ranks | None = None,
    stop: StopSignals | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Train, from the start or from a checkpoint, until the end or a signal.

    Args:
        output: gets checkpoints/, metrics.jsonl, tensorboard/, loss.png and summary.json.
        settings: everything else the course depends on (recipe, data, base model). Recorded; a resumed run has to have
            the same, but for the full names in ``free`` (nested ones joined by dots).
        evaluation: held-out batches; read as epoch 0 every time.
        save_model: writes adapter or model into the (empty) folder of a checkpoint; called on rank 0.
        model_bytes: about what it writes, to see beforehand whether it fits.
        resume: latest, best, or a checkpoint's folder.
        stop: signals watched since before MindSpore was imported; else they are watched from here on.
        stream: for the progress (default: standard error).

    Raises:
        TrainingError: diverged, disk full, changed settings, or checkpoints of another run in ``output``.
        CheckpointError: the checkpoint to resume from is damaged. DataError: no batch, nothing to learn or evaluate.
    """
    ranks = ranks or Ranks()
    config = {**(settings or {}), "loop": asdict(options), "data": _data(batches, evaluation, ranks)}
    with contextlib.ExitStack() as stack:
        loop = _Loop(step, batches, evaluation, options, ranks, output, plain(config))
        loop.shown = display(stream or sys.stderr, options.log_every, ranks.rank)
        loop.stop = stop or stack.enter_context(StopSignals())
        loop.stop.tell = loop.shown.note  # above the bar, and of rank 0 alone
        loop.save_model, loop.model_bytes = save_model, model_bytes
        stack.callback(loop.close)
        loop.begin(resume, free)
        return loop.run()


def _data(batches: Batches, evaluation: Batches | None, ranks: Ranks) -> dict[str, Any]:
    if batches.steps_per_epoch < 1:
        raise DataError("the training data gives not a single batch; add samples or use a smaller batch size")
    held_out = evaluation.steps_per_epoch if evaluation is not None else None
    if held_out == 0:
        raise DataError("the evaluation data gives not a single batch; add samples or leave it out")
    return {
        "batches_per_epoch": batches.steps_per_epoch,
        "evaluation_batches": held_out,
        "world": ranks.world,
    }


class _Loop:
    """One run; ``begin`` and ``run`` are called once each."""

    shown: Display
    stop: StopSignals
    save_model: SaveModel | None
    model_bytes: int

    def __init__(
        self,
        train: TrainStep,
        batches: Batches,
        evaluation: Batches | None,
        options: LoopOptions,
        ranks: Ranks,
        output: Path,
        config: dict[str, Any],
    ) -> None:
        self.train, self.batches, self.evaluation, self.options = train, batches, evaluation, options
        self.ranks, self.output, self.config = ranks, Path(os.path.abspath(output)), config
        self.total = _planned(batches.steps_per_epoch, options)
        self.checkpoints = Checkpoints(self.output / CHECKPOINTS, options.keep_last)
        self.state, self.history = LoopState(), History()
        self.report: Report | None = None
        self._saved: tuple[int, int] | None = None  # step and number of evaluations of the newest checkpoint
        self._clock, self._before = time.monotonic(), 0.0

    def begin(self, resume: str | Path | None, free: Collection[str]) -> None:
        """Load the checkpoint, or see that there is none; then rank 0 prepares the folder."""
        if resume == "auto":
            resume = "latest" if self.checkpoints.steps() else None
        if resume is not None:
            self._restore(load_checkpoint(self.checkpoints.find(resume)), free)
        if self.checkpoints.steps() and (resume is None or self._saved is None):
            raise TrainingError(
                f"{self.checkpoints.folder} holds the checkpoints of another run; resume from one of them, choose "
                "another output folder, or remove them"
            )
        # All have read what they need before rank 0 changes anything.
        (steps,) = self.ranks.sums(self.state.step)
        if steps != self.state.step * self.ranks.world:
            raise TrainingError(
                "the processes found different checkpoints; every node has to see the same folder"
            )
        arrays = self._arrays()
        if self.ranks.rank == 0:
            self.checkpoints.clear_leftovers()
            self.checkpoints.check_space(arrays, self.model_bytes)
            for folder in self.checkpoints.set_aside(self.state.step):
                self.shown.note(f"a later checkpoint is set aside: {folder}")
            self.report = Report(self.output, self.history, self.options.tensorboard)

    def run(self) -> Outcome:
        """Train until there is a reason to end; the report is written in any case."""
        self.shown.start(self.total, self.state.step)
        try:
            reason = self._train()
        except QwenError as error:
            with contextlib.suppress(TrainingError):  # the first error is the one to tell
                self._finish("error", error)
            raise
        summary = self._finish(reason, None)
        return Outcome(
            reason, self.state.step, self.checkpoints.latest(), self._best(), self.history, summary
        )

    def close(self) -> None:
        """Close files and the progress bar."""
        self.shown.close()
        if self.report is not None:
            self.report.close()

    def _train(self) -> str:
        groups = self._groups()
        while True:
            reason = self._between()
            if reason is not None:
                return reason
            self._step(next(groups))

    def _between(self) -> str | None:
        """What comes after a step (also after the one a resumed run begins with): the reason to end, or None."""
        asked, better = self._asked(), False
        done = self.state.step >= self.total
        if not asked and self._evaluation_is_due(done):
            better = self._evaluate()
            asked = self._asked()
        patience = self.options.patience
        reason = asked
        if reason is None and done:
            reason = "finished"
        elif reason is None and patience is not None and self.state.bad_evaluations >= patience:
            reason = "early stop"
        if reason or better or self._is_due(self.options.save_every):
            self._save()
        return reason

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of one optimizer step after the other, from where the state is."""
        epoch, micro, whole = self.state.epoch, self.state.micro, self.batches.steps_per_epoch
        while True:
            group: list[Batch] = []
            for batch in self.batches.epoch(epoch, start=micro):
                micro += 1
                group.append(batch)
                if len(group) == self.options.accumulate or micro == whole:
                    yield group
                    group = []
            if micro != whole:
                raise DataError(
                    f"epoch {epoch} of the training data gave {micro} batches, not {whole}; did it change?"
                )
            epoch, micro = epoch + 1, 0

    def _step(self, micro: Sequence[Batch]) -> None:
        state, began = self.state, time.monotonic()
        lr = self.options.schedule.at(state.step - state.skipped, self.total)
        result = self.train.step(micro, lr)
        seconds = time.monotonic() - began
        self.stop.restore()
        place = f"batch {state.micro + 1} of epoch {state.epoch + 1}"
        check_result(result, state.step + 1, lr, place, self.checkpoints.latest)
        state.step += 1
        state.micro += len(micro)
        if state.micro >= self.batches.steps_per_epoch:
            state.epoch, state.micro = state.epoch + 1, 0
        seen = sum(int(np.count_nonzero(batch.segments != PADDING)) for batch in micro)
        record = Record(
            epoch=state.epoch + state.micro / self.batches.steps_per_epoch,
            loss=math.nan if result.overflow else float(result.loss),
            lr=lr,
            grad_norm=math.nan if result.overflow else float(result.grad_norm),
            tokens=result.tokens,
            seen=seen * self.ranks.world,  # the others' rows are about as long
            seconds=seconds,
            overflow=bool(result.overflow),
            loss_scale=float(result.loss_scale),
        )
        self.history.add(record)
        self.shown.step(state.step, record)
        if self.report is not None:
            self.report.step(state.step, record)
        state.skipped += record.overflow
        stuck = record.overflow and record.loss_scale <= self.options.least_scale
        state.stuck = state.stuck + 1 if stuck else 0
        check_overflow(record, state.step, state.stuck, self.options.overflow_limit, self.checkpoints.latest)

    def _evaluation_is_due(self, done: bool) -> bool:
        """A stop may have come between the step and its evaluation, so it is made up for after a resume."""
        if self.evaluation is None or not (done or self._is_due(self.options.eval_every)):
            return False
        found = self.history.evaluations
        return self.state.step > 0 and not (found and found[-1].step == self.state.step)

    def _is_due(self, every: int | None) -> bool:
        if self.state.step == 0:
            return False
        return self.state.micro == 0 if every is None else self.state.step % every == 0

    def _evaluate(self) -> bool:
        """Read the held-out data; whether it is the best so far. A stop in between leaves no trace."""
        assert self.evaluation is not None
        loss, count = 0.0, 0
        for batch in self.evaluation.epoch(0):
            if self.stop.name and self.ranks.world == 1:
                return False
            part, tokens = self.train.evaluate(batch)
            self.stop.restore()
            loss, count = loss + float(part), count + int(tokens)
        whole, tokens_of_all = self.ranks.sums(loss, count)
        if tokens_of_all == 0:
            raise DataError("the evaluation data has not one token to predict; give samples with answers")
        found = Evaluation(self.state.step, whole / tokens_of_all)
        check_evaluation(found, self.checkpoints.latest)
        return self._judge(found)

    def _judge(self, found: Evaluation) -> bool:
        state = self.state
        better = state.best_loss is None or found.loss < state.best_loss - self.options.min_delta
        if better:
            state.best_loss, state.best_step, state.bad_evaluations = found.loss, found.step, 0
        else:
            state.bad_evaluations += 1
        self.history.evaluations.append(found)
        self.shown.evaluated(found, better)
        if self.report is not None:
            self.report.evaluated(found)
        return better

    def _asked(self) -> str | None:
        """The signal that came to any of the processes, so that all end after the same step."""
        if self.ranks.world == 1:
            return self.stop.name
        interrupts, stops = self.ranks.sums(self.stop.name == "SIGINT", self.stop.name is not None)
        return ("SIGINT" if interrupts else "SIGTERM") if stops else None

    def _save(self) -> None:
        step, found = self.state.step, len(self.history.evaluations)
        if step == 0 or self._saved == (step, found):
            return
        same = self._saved is not None and self._saved[0] == step
        arrays = {} if same else self._arrays()
        failure: TrainingError | None = None
        if self.ranks.rank == 0:
            try:
                if same:  # only evaluated since
                    self.checkpoints.update(step, self._values())
                else:
                    self._write(arrays)
            except TrainingError as error:
                failure = error
        if self.ranks.sums(failure is not None)[0] or failure:
            raise failure or TrainingError("rank 0 could not write a checkpoint; its log says why")
        self._saved = (step, found)

    def _write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        state = self.state
        folder = self.checkpoints.save(
            state.step, self._values(), arrays, self.save_model, state.best_step, self.model_bytes
        )
        self.shown.note(f"saved {folder}")

    def _values(self) -> dict[str, Any]:
        """The part of a checkpoint that is no array."""
        self.state.seconds = self._before + time.monotonic() - self._clock
        return {
            "config": self.config,
            "best_step": self.state.best_step,
            "loop": asdict(self.state),
            "evaluations": [[one.step, one.loss] for one in self.history.evaluations],
        }

    def _arrays(self) -> dict[str, NDArray[Any]]:
        model = {MODEL + name: np.asarray(values) for name, values in self.train.state().items()}
        return model | {HISTORY + name: values for name, values in self.history.arrays().items()}

    def _restore(self, saved: Saved, free: Collection[str]) -> None:
        try:
            config, values = saved.state["config"], saved.state["loop"]
            state = LoopState(**values)
            history = History.restored(_below(HISTORY, saved.arrays), saved.state["evaluations"])
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise CheckpointError(
                f"checkpoint {saved.folder} is damaged: {error}; resume from another one"
            ) from None
        refuse_changes(saved.folder, config, self.config, FREE | set(free))
        if len(history) != state.step:
            raise CheckpointError(
                f"checkpoint {saved.folder} is damaged: {len(history)} steps of {state.step}"
            )
        self.train.load_state(_below(MODEL, saved.arrays))
        self.state, self.history, self._before = state, history, state.seconds
        if saved.folder.parent == self.checkpoints.folder:
            self._saved = (state.step, len(history.evaluations))
        self.shown.note(f"resumed from {saved.folder} after step {state.step}")
        for change in differences(config, self.config):
            self.shown.note(f"changed since: {change}")

    def _finish(self, reason: str, error: Exception | None) -> dict[str, Any]:
        self._values()  # brings the time up to date
        latest, best = self.checkpoints.latest(), self._best()
        summary = summarise(
            self.history,
            self.config,
            reason=reason,
            error=None if error is None else str(error),
            steps=self.state.step,
            planned_steps=self.total,
            epochs=round(self.state.epoch + self.state.micro / self.batches.steps_per_epoch, 4),
            seconds=round(self.state.seconds, 3),
            checkpoints={"latest": latest, "best": best},
        )
        if self.report is not None:
            self.report.finish(self.history, summary, self.shown.note)
        if error is None:
            self.shown.note(
                f"{reason} after {self.state.step} steps in {clock(self.state.seconds)}: {self.output}"
            )
        return summary

    def _best(self) -> Path | None:
        step = self.state.best_step
        return (
            self.checkpoints.path(step) if step is not None and self.checkpoints.path(step).is_dir() else None
        )


def _planned(per_epoch: int, options: LoopOptions) -> int:
    """Optimizer steps of the whole run."""
    if options.max_steps is not None:
        return options.max_steps
    return math.ceil(options.epochs * math.ceil(per_epoch / options.accumulate))


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name[len(prefix) :]: values for name, values in arrays.items() if name.startswith(prefix)}
