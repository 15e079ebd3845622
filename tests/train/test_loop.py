"""The training loop with a model of 16 numbers: steps, accumulation, evaluation, early stop, failures."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from research.qwen.errors import ConfigError, DataError, TrainingError
from research.qwen.train.loop import run
from research.qwen.train.options import LoopOptions
from research.qwen.train.schedule import Schedule
from tests.train.fake_training import FakeBatches, FakeResult, FakeStep, curve, options, train

NAN = FakeResult(math.nan, 1.0, 10)


def test_it_learns_and_leaves_usable_checkpoints(tmp_path: Path) -> None:
    step = FakeStep()
    outcome = train(tmp_path, step, max_steps=200, save_every=90)
    losses = outcome.history.column("loss")
    assert losses[-1] < 0.1 * losses[0]
    assert (outcome.reason, outcome.step, outcome.exit_code) == ("finished", 200, 0)
    assert outcome.latest == tmp_path / "checkpoints" / "step-000200"
    assert (outcome.latest / "adapter_model.safetensors").read_bytes() == step.weight.tobytes()
    assert sorted(path.name for path in outcome.latest.parent.iterdir()) == ["step-000180", "step-000200"]


def test_every_step_has_the_rate_of_the_schedule(tmp_path: Path) -> None:
    step = FakeStep()
    outcome = train(tmp_path, step)
    assert step.rates == [Schedule(0.05, warmup_steps=3).at(number, 12) for number in range(12)]
    assert outcome.history.column("lr").tolist() == step.rates


def test_accumulation_groups_batches_within_an_epoch(tmp_path: Path) -> None:
    step, batches = FakeStep(), FakeBatches(5)
    outcome = train(tmp_path, step, batches, max_steps=None, epochs=2, accumulate=2, save_every=None)
    assert step.sizes == [2, 2, 1, 2, 2, 1]
    assert batches.asked == [(0, 0), (1, 0)]
    assert outcome.history.column("epoch").tolist() == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    assert outcome.history.column("tokens").tolist() == [26, 26, 13, 26, 26, 13]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000006",
    ]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (0.5, 2), (2.4, 8)])
def test_epochs_may_be_fractions(epochs: float, steps: int, tmp_path: Path) -> None:
    assert train(tmp_path, max_steps=None, epochs=epochs, accumulate=2).step == steps


def test_evaluation_is_a_mean_over_tokens(tmp_path: Path) -> None:
    step, held_out = FakeStep(frozen=True), FakeBatches(3, seed=9)
    outcome = train(tmp_path, step, evaluation=held_out, eval_every=5)
    parts = [FakeStep().evaluate(batch) for batch in FakeBatches(3, seed=9).epoch(0)]
    mean = sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)
    found = outcome.history.evaluations
    assert [one.step for one in found] == [5, 10, 12]
    assert [one.loss for one in found] == [pytest.approx(mean, rel=1e-12)] * 3
    assert found[0].perplexity == pytest.approx(math.exp(mean))


def test_the_best_is_kept_and_named(tmp_path: Path) -> None:
    # A rate far too high from step 7 on: the best evaluation is before.
    step = FakeStep()
    held_out = FakeBatches(2, seed=9)
    outcome = train(
        tmp_path,
        step,
        max_steps=40,
        schedule=Schedule(0.3, "linear", warmup_steps=38),
        evaluation=held_out,
        eval_every=2,
        save_every=3,
        keep_last=1,
    )
    losses = {one.step: one.loss for one in outcome.history.evaluations}
    best = min(losses, key=lambda number: losses[number])
    assert 2 < best < 38
    assert outcome.best == tmp_path / "checkpoints" / f"step-{best:06d}"
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{best:06d}", "step-000040"]


def test_early_stop(tmp_path: Path) -> None:
    outcome = train(
        tmp_path, FakeStep(frozen=True), evaluation=FakeBatches(2), eval_every=2, patience=3, save_every=100
    )
    assert (outcome.reason, outcome.step, outcome.exit_code) == ("early stop", 8, 0)
    assert outcome.best == tmp_path / "checkpoints" / "step-000002"
    assert outcome.latest == tmp_path / "checkpoints" / "step-000008"


def test_a_gain_has_to_be_large_enough(tmp_path: Path) -> None:
    more = {"evaluation": FakeBatches(2), "eval_every": 2, "patience": 2, "save_every": 100, "max_steps": 40}
    assert train(tmp_path / "a", **more, min_delta=10.0).step == 6
    assert train(tmp_path / "b", **more).step > 6


def test_nan_stops_and_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, FakeStep({7: NAN}), max_steps=20)
    rate = Schedule(0.05, warmup_steps=3).at(6, 20)
    for part in (
        f"step 7 (learning rate {rate:.3g}): the loss is nan",
        f"last good checkpoint is {tmp_path}/checkpoints/step-000004",
        "lower learning rate",
        "bf16",
        "batch 2 of epoch 2",
    ):
        assert part in str(caught.value)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reason"] == "error" and summary["error"] == str(caught.value) and summary["steps"] == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (FakeResult(math.inf, 1.0, 10), "the loss is inf"),
        (FakeResult(1.0, math.nan, 10), "the gradient norm is nan"),
        (FakeResult(math.nan, 0.0, 0), "not one token of this step is learned from"),
    ],
)
def test_other_ways_to_diverge(result: FakeResult, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        train(tmp_path, FakeStep({1: result}))
    assert "There is no checkpoint yet" in str(caught.value)


def test_a_diverged_evaluation(tmp_path: Path) -> None:
    step = FakeStep()
    step.evaluate = lambda batch: (math.nan, 3)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the evaluation loss is nan after step 2"):
        train(tmp_path, step, evaluation=FakeBatches(1), eval_every=2)


def overflow(scale: float) -> FakeResult:
    return FakeResult(math.inf, math.nan, 10, True, scale)


def test_overflowing_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    step = FakeStep({5: overflow(64), 6: overflow(32)})
    outcome = train(tmp_path, step)
    assert outcome.step == 12 and outcome.summary["skipped_steps"] == 2
    losses = outcome.history.column("loss")
    assert np.flatnonzero(np.isnan(losses)).tolist() == [4, 5]
    # The schedule waits for a skipped step, as transformers' trainer lets it.
    schedule = Schedule(0.05, warmup_steps=3)
    assert step.rates == [schedule.at(number, 12) for number in (0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[4]["loss"] is None and lines[4]["overflow"] is True and lines[4]["loss_scale"] == 64


def test_overflows_at_the_least_scale_end_the_run(tmp_path: Path) -> None:
    results = {number: overflow(1.0) for number in range(3, 13)}
    with pytest.raises(TrainingError, match=r"at step 5 .*3 times in a row .*scale is down to 1\..*bf16"):
        train(tmp_path, FakeStep(results), overflow_limit=3)


def test_overflows_at_a_higher_scale_or_apart_do_not(tmp_path: Path) -> None:
    higher = {number: overflow(2.0) for number in range(3, 9)}
    assert train(tmp_path / "a", FakeStep(higher), overflow_limit=3).step == 12
    apart = {number: overflow(1.0) for number in (3, 4, 6, 7, 9, 10)}
    assert train(tmp_path / "b", FakeStep(apart), overflow_limit=3).step == 12


def test_an_output_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(TrainingError, match="holds the checkpoints of another run; resume"):
        train(tmp_path)


class ShortBatches(FakeBatches):
    """Says five, gives three."""

    def epoch(self, number: int, start: int = 0):  # type: ignore[no-untyped-def]
        yield from list(super().epoch(number, start))[:3]


def test_data_that_does_not_keep_its_word(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="epoch 0 of the training data gave 3 batches, not 5"):
        train(tmp_path, batches=ShortBatches(5))
    with pytest.raises(DataError, match="training data gives not a single batch"):
        train(tmp_path / "b", batches=FakeBatches(0))
    with pytest.raises(DataError, match="evaluation data gives not a single batch"):
        train(tmp_path / "c", evaluation=FakeBatches(0))


def test_evaluation_without_a_token(tmp_path: Path) -> None:
    step = FakeStep()
    step.evaluate = lambda batch: (0.0, 0)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="not one token to predict"):
        train(tmp_path, step, evaluation=FakeBatches(1), eval_every=2)


BAD = {
    "max_steps": 0,
    "accumulate": 0,
    "keep_last": 0,
    "eval_every": -1,
    "epochs": 0.0,
    "min_delta": -1.0,
    "patience": 0,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        options(**{name: BAD[name]})


def test_the_hook_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.qwen.train.report.draw", lambda *_: None)
    outcome = run(FakeStep(), FakeBatches(3), LoopOptions(Schedule(0.1)), tmp_path, stream=io.StringIO())
    assert outcome.latest is not None
    assert [path.name for path in outcome.latest.iterdir()] == ["training"]


def test_two_runs_are_the_same(tmp_path: Path) -> None:
    more = {"evaluation": FakeBatches(2), "eval_every": 3}
    assert curve(train(tmp_path / "a", **more)) == curve(train(tmp_path / "b", **more))


def test_too_small_a_disk_is_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=1_000_000))
    step = FakeStep()
    with pytest.raises(TrainingError, match=r"not enough space in .* needed, 2\.0 MB free"):
        train(tmp_path, step, model_bytes=1_000_000)
    assert step.rates == []
