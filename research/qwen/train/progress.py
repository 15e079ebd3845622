"""What a user sees while a model trains: a bar on a terminal, plain lines elsewhere, nothing on the other ranks."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from typing import Any, Protocol, TextIO

from research.qwen.train.history import Evaluation, Record

WINDOW = 20  # steps over which speed and the time left are taken


class Display(Protocol):
    """Told of everything that happens; writes to one stream."""

    def start(self, total: int, done: int) -> None:
        """Training begins, ``done`` of ``total`` steps are behind it."""

    def step(self, number: int, record: Record) -> None:
        """Step ``number`` (from 1) is done."""

    def evaluated(self, evaluation: Evaluation, best: bool) -> None:
        """The held-out data was read."""

    def note(self, text: str) -> None:
        """Something the user should know, one line."""

    def close(self) -> None:
        """Training has ended."""


class Silent:
    """For the ranks that show nothing."""

    def start(self, total: int, done: int) -> None:
        pass

    def step(self, number: int, record: Record) -> None:
        pass

    def evaluated(self, evaluation: Evaluation, best: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Pace:
    """Speed over the last steps; the first, in which graphs are compiled, counts as little as it can."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=WINDOW + 1)
        self._seen: deque[float] = deque(maxlen=WINDOW)
        self._first: float | None = None

    def add(self, record: Record, now: float) -> None:
        """A step has ended at ``now`` (seconds, monotonic)."""
        if not self._times:
            self._first = record.seen / record.seconds if record.seconds > 0 else None
        else:
            self._seen.append(record.seen)
        self._times.append(now)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the last steps with all that lies between them; None before the second."""
        count = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / count if count > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that are no padding, per second."""
        passed = self._times[-1] - self._times[0] if self._times else 0.0
        return sum(self._seen) / passed if passed > 0 else self._first


class Lines:
    """A line every ``every`` steps, with the mean loss since the line before."""

    def __init__(self, stream: TextIO, every: int) -> None:
        self._stream, self._every = stream, every
        self._total, self._pace = 0, Pace()
        self._losses: list[float] = []

    def start(self, total: int, done: int) -> None:
        self._total = total

    def step(self, number: int, record: Record) -> None:
        self._pace.add(record, time.monotonic())
        if not math.isnan(record.loss):
            self._losses.append(record.loss)
        if number % self._every == 0 or number in (1, self._total):
            loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
            self._losses = []
            left = self._pace.seconds_per_step
            parts = [
                f"step {number}/{self._total}",
                f"epoch {record.epoch:.2f}",
                f"loss {loss:.4f}",
                *_details(record, self._pace),
                *([f"eta {clock(left * (self._total - number))}"] if left is not None else []),
            ]
            self.note("  ".join(parts))

    def evaluated(self, evaluation: Evaluation, best: bool) -> None:
        self.note(evaluation_text(evaluation, best))

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: no reason to end a long run
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        pass


class Bar:
    """tqdm's bar, notes above it."""

    def __init__(self, stream: TextIO, tqdm: Any) -> None:
        self._stream, self._tqdm = stream, tqdm
        self._pace = Pace()
        self._bar: Any = None

    def start(self, total: int, done: int) -> None:
        self._bar = self._tqdm(
            total=total, initial=done, unit="step", desc="training", file=self._stream, dynamic_ncols=True
        )

    def step(self, number: int, record: Record) -> None:
        self._pace.add(record, time.monotonic())
        shown = "  ".join([f"loss {record.loss:.4f}", *_details(record, self._pace)])
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(1)

    def evaluated(self, evaluation: Evaluation, best: bool) -> None:
        self.note(evaluation_text(evaluation, best))

    def note(self, text: str) -> None:
        self._tqdm.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def display(stream: TextIO, every: int, rank: int = 0) -> Display:
    """The right one of the three for a stream; ``every`` steps a line where there is no terminal."""
    if rank:
        return Silent()
    if stream.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return Bar(stream, tqdm)
    return Lines(stream, every)


def evaluation_text(evaluation: Evaluation, best: bool) -> str:
    """``step 100: evaluation loss 1.2345, perplexity 3.44 (best so far)``."""
    text = f"step {evaluation.step}: evaluation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.4g}"
    return f"{text} (best so far)" if best else text


def clock(seconds: float) -> str:
    """``1:02:03`` for people."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _details(record: Record, pace: Pace) -> list[str]:
    speed = pace.tokens_per_s
    parts = [f"lr {record.lr:.2e}", f"grad {record.grad_norm:.3f}"]
    if speed is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if record.overflow:
        parts.append(f"overflow, scale {record.loss_scale:g}")
    return parts
