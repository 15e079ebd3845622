"""Several processes, here threads: they end after the same step, only rank 0 writes and speaks, all load."""

from __future__ import annotations

import io
import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from research.qwen.errors import QwenError, TrainingError
from research.qwen.train.loop import run
from research.qwen.train.options import Outcome
from research.qwen.train.protocols import Ranks
from tests.train.fake_training import FakeBatches, FakeStep, Quiet, curve, options, train


class Meeting:
    """Sums over two threads; a thread that fails leaves the other with an error, not waiting.

    Not a threading.Barrier: one that is aborted fails also those it has let go already, if they have not run since.
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.rounds: dict[int, dict[int, NDArray[np.float64]]] = {}
        self.aborted = False

    def ranks(self, rank: int) -> Ranks:
        numbers = itertools.count()

        def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
            with self.change:
                parts = self.rounds.setdefault(next(numbers), {})
                parts[rank] = values
                self.change.notify_all()
                self.change.wait_for(lambda: len(parts) == 2 or self.aborted, 20)
            if len(parts) < 2:
                raise threading.BrokenBarrierError
            return parts[0] + parts[1]

        return Ranks(rank, 2, total)

    def abort(self) -> None:
        with self.change:
            self.aborted = True
            self.change.notify_all()


class Rank:
    """One of the two; ``outcome`` or ``error`` after the run."""

    def __init__(self, output: Path, step: FakeStep, evaluation: FakeBatches | None = None) -> None:
        self.output, self.step, self.evaluation = output, step, evaluation
        self.stop, self.stream = Quiet(), io.StringIO()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None

    def run(self, ranks: Ranks, meeting: Meeting, **more: Any) -> None:
        try:
            self.outcome = run(
                self.step,
                FakeBatches(5),
                options(eval_every=4, log_every=1),
                self.output,
                evaluation=self.evaluation,
                ranks=ranks,
                stop=self.stop,
                stream=self.stream,
                save_model=self.step.save_model,
                **more,
            )
        except (QwenError, threading.BrokenBarrierError) as error:
            self.error = error
            meeting.abort()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.qwen.train.report.draw", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


def both(*pair: Rank, **more: Any) -> None:
    meeting = Meeting()
    threads = [
        threading.Thread(target=one.run, args=(meeting.ranks(rank), meeting), kwargs=more, daemon=True)
        for rank, one in enumerate(pair)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_rank_0_writes_and_speaks_and_the_evaluation_is_of_all(tmp_path: Path) -> None:
    first = Rank(tmp_path, FakeStep(), FakeBatches(1, seed=9))
    second = Rank(tmp_path / "nothing", FakeStep(), FakeBatches(1, seed=8))
    both(first, second)
    assert first.error is None and second.error is None
    assert first.outcome is not None and second.outcome is not None
    assert "step 12/12" in first.stream.getvalue() and second.stream.getvalue() == ""
    assert not (tmp_path / "nothing").exists()
    assert first.outcome.history.evaluations == second.outcome.history.evaluations
    alone = FakeStep()
    sums = [alone.evaluate(batch) for seed in (9, 8) for batch in FakeBatches(1, seed=seed).epoch(0)]
    train(tmp_path / "alone", alone)
    assert first.outcome.history.evaluations[0].loss != sums[0][0] / sums[0][1]
    got = [alone.evaluate(batch) for seed in (9, 8) for batch in FakeBatches(1, seed=seed).epoch(0)]
    expected = sum(loss for loss, _ in got) / sum(count for _, count in got)
    assert first.outcome.history.evaluations[-1].loss == pytest.approx(expected, rel=1e-12)
    assert first.outcome.history.column("seen")[0] == 2 * 13


class Signalled(FakeStep):
    """Its process gets a signal in step 5."""

    stop: Quiet

    def step(self, micro: Any, lr: float) -> Any:
        if self.steps == 4:
            self.stop.name = "SIGTERM"
            self.stop.tell("SIGTERM came")
        return super().step(micro, lr)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_ends_all_after_the_same_step(rank: int, tmp_path: Path) -> None:
    steps = [FakeStep(), FakeStep()]
    steps[rank] = Signalled()
    pair = [Rank(tmp_path, step) for step in steps]
    steps[rank].stop = pair[rank].stop  # type: ignore[attr-defined]
    both(*pair)
    assert [(one.outcome.reason, one.outcome.step) for one in pair if one.outcome] == [("SIGTERM", 5)] * 2
    assert ("SIGTERM came" in pair[0].stream.getvalue()) == (rank == 0) and pair[1].stream.getvalue() == ""
    again = [Rank(tmp_path, FakeStep()) for _ in range(2)]
    both(*again, resume="latest")
    assert all(one.outcome is not None and one.step.steps == 12 for one in again), [
        one.error for one in again
    ]
    assert again[0].step.weight.tobytes() == again[1].step.weight.tobytes()
    straight = FakeStep()
    expected = train(tmp_path / "straight", straight)
    assert again[1].step.weight.tobytes() == straight.weight.tobytes()
    assert again[1].outcome is not None and curve(again[1].outcome) == curve(expected)


def test_a_failure_of_rank_0_to_save_is_one_of_all(tmp_path: Path) -> None:
    first, second = Rank(tmp_path, FakeStep()), Rank(tmp_path, FakeStep())

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    first.step.save_model = full  # type: ignore[method-assign]
    both(first, second)
    assert isinstance(first.error, TrainingError) and "No space left" in str(first.error)
    assert isinstance(second.error, TrainingError) and "rank 0 could not write" in str(second.error)


def test_the_number_of_processes_may_not_change(tmp_path: Path) -> None:
    train(tmp_path / "a", max_steps=4)
    pair = [Rank(tmp_path / name, FakeStep()) for name in "ab"]
    both(*pair, resume="auto")
    assert pair[0].outcome is None and pair[1].outcome is None
    assert "data.world: 1 there, 2 now" in str(pair[0].error)


def test_processes_that_resume_from_different_steps_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        pair = [Rank(tmp_path / name, FakeStep()) for _ in range(2)]
        both(*pair)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000012")
    pair = [Rank(tmp_path / name, FakeStep()) for name in "ab"]
    both(*pair, resume="latest")
    assert pair[0].error is not None and pair[1].error is not None
    assert any("the processes found different checkpoints" in str(one.error) for one in pair)
