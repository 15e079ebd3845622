"""What a run leaves beside its checkpoints: metrics.jsonl, TensorBoard events, loss.png and summary.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.qwen import __version__
from research.qwen.errors import CheckpointError, TrainingError
from research.qwen.train.checkpoints import plain
from research.qwen.train.history import Evaluation, History, Record, finite
from research.qwen.train.tensorboard import EventWriter
from research.qwen.weights.outputs import OutputSet

METRICS, CURVE, SUMMARY, EVENTS = "metrics.jsonl", "loss.png", "summary.json", "tensorboard"
NO_MATPLOTLIB = f"no {CURVE}: matplotlib is not installed; pip install 'qwen-mindspore[finetune]'"
PACKAGES = ("numpy", "mindspore", "mindformers")
LAST = 10  # steps of which the summary gives the mean loss
SMOOTH = 0.9  # weight of the past in the smoothed curve


class Report:
    """The files of one run, for rank 0.

    ``history`` is what a resumed run has behind it: metrics.jsonl begins with it, so that no line of an abandoned
    course stays. ``events``: write those of TensorBoard, too. Every method raises TrainingError if the disk is full.
    """

    def __init__(self, folder: Path, history: History, events: bool = True) -> None:
        self.folder = folder
        with _disk(folder):
            with OutputSet(folder, force=True) as output:
                output.write(METRICS, lambda stream: _write_lines(stream, history))
            self._metrics = (folder / METRICS).open("a", encoding="utf-8")
            self._events = EventWriter(folder / EVENTS, len(history) + 1) if events else None

    def step(self, number: int, record: Record) -> None:
        """Step ``number`` (from 1) is done."""
        scalars = {"train/loss": record.loss, "train/grad_norm": record.grad_norm, "train/lr": record.lr}
        scalars["train/loss_scale"] = record.loss_scale
        if record.seconds > 0:
            scalars["train/tokens_per_s"] = record.seen / record.seconds
        self._add(number, record.as_json(number), scalars)

    def evaluated(self, evaluation: Evaluation) -> None:
        """The held-out data was read."""
        scalars = {"eval/loss": evaluation.loss, "eval/perplexity": evaluation.perplexity}
        self._add(evaluation.step, evaluation.as_json(), scalars)

    def finish(self, history: History, summary: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Write summary.json and loss.png; ``note`` is told if there can be no picture."""
        with _disk(self.folder):
            text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            with OutputSet(self.folder, force=True) as output:
                output.write_text(SUMMARY, text)
            if len(history):
                try:
                    with OutputSet(self.folder, force=True) as output:
                        output.write(CURVE, lambda stream: draw(history, stream))
                except ImportError:
                    note(NO_MATPLOTLIB)

    def close(self) -> None:
        """Close the files that are appended to."""
        with contextlib.suppress(OSError):  # a full disk was told of when it was written to
            self._metrics.close()
        with contextlib.suppress(OSError):
            if self._events is not None:
                self._events.close()

    def _add(self, step: int, line: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        with _disk(self.folder):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            if self._events is not None:
                self._events.add(step, {tag: value for tag, value in scalars.items() if math.isfinite(value)})
                self._events.flush()


def draw(history: History, stream: BinaryIO) -> None:
    """The loss curve as PNG; raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps, loss = np.arange(1, len(history) + 1), history.column("loss")
    marker = "." if len(steps) < 3 else ""
    axis.plot(steps, loss, color="#9ecae1", linewidth=0.8, marker=marker, label="loss of each step")
    axis.plot(steps, smoothed(loss), color="#08519c", label="smoothed")
    if history.evaluations:
        places = [one.step for one in history.evaluations]
        axis.plot(
            places, [one.loss for one in history.evaluations], "o-", color="#d94801", label="held-out data"
        )
    axis.set_xlabel("step")
    axis.set_ylabel("loss per token")
    axis.grid(alpha=0.3)
    rates = axis.twinx()
    rates.plot(steps, history.column("lr"), color="#969696", linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(stream, dpi=110, format="png")


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean of (steps,) values without the pull of its start; NaN (a skipped step) is left out."""
    out, mean, weight = np.full(len(values), np.nan), 0.0, 0.0
    for place, value in enumerate(values):
        if not math.isnan(value):
            mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
        if weight:
            out[place] = mean / weight
    return out


def summarise(history: History, config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The contents of summary.json; ``more`` are further entries, put first."""
    loss, seconds = history.column("loss"), float(history.column("seconds").sum())
    known = loss[~np.isnan(loss)]
    seen = int(history.column("seen").sum())
    settings = plain(config)
    return {
        **plain(more),
        "tokens_learned": int(history.column("tokens").sum()),
        "tokens_seen": seen,
        "skipped_steps": int(history.column("overflow").sum()),
        "step_seconds": round(seconds, 3),
        "tokens_per_s": round(seen / seconds, 1) if seconds > 0 else None,
        "loss": {
            "first": float(known[0]) if known.size else None,
            "last": float(known[-1]) if known.size else None,
            f"mean_of_last_{LAST}": float(known[-LAST:].mean()) if known.size else None,
        },
        "evaluation": _evaluations(history.evaluations),
        "config_hash": config_hash(settings),
        "config": settings,
        "versions": dict(versions()),
    }


def _evaluations(found: list[Evaluation]) -> dict[str, Any] | None:
    if not found:
        return None
    best = min(found, key=lambda one: one.loss)
    return {
        key: {"step": one.step, "loss": one.loss, "perplexity": finite(one.perplexity)}
        for key, one in (("first", found[0]), ("last", found[-1]), ("best", best))
    }


def config_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings in one order of keys."""
    text = json.dumps(plain(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@cache
def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what computes; None for what is not installed."""
    out: dict[str, str | None] = {"qwen-mindspore": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def _write_lines(stream: BinaryIO, history: History) -> None:
    later = list(history.evaluations)
    for number, record in history.records():
        stream.write((json.dumps(record.as_json(number)) + "\n").encode())
        while later and later[0].step == number:
            stream.write((json.dumps(later.pop(0).as_json()) + "\n").encode())


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """An error of the disk as a TrainingError."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"the report in {folder} could not be written: {error}") from None
