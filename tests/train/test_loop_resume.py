"""Resumed runs: the very same course from any checkpoint, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from research.qwen.errors import CheckpointError, TrainingError
from research.qwen.train.checkpoints import load_checkpoint
from research.qwen.train.schedule import Schedule
from tests.train.fake_training import FakeBatches, FakeResult, FakeStep, Quiet, curve, train

MORE: dict[str, Any] = {
    "accumulate": 2,
    "eval_every": 3,
    "save_every": 2,
    "keep_last": 20,
    "settings": {"lr": 1},
}


def whole(output: Path, **more: Any):
    """Twelve steps of up to two batches: four epochs of five batches, evaluated and saved all along."""
    return train(output, batches=FakeBatches(5), evaluation=FakeBatches(2, seed=9), **{**MORE, **more})


@pytest.mark.parametrize("step", [2, 4, 6, 8, 9, 10])
def test_the_same_course_from_every_checkpoint(step: int, tmp_path: Path) -> None:
    """Inside an epoch, at its end, with an overflow and evaluations before and after."""
    skipped = FakeResult(float("inf"), float("nan"), 5, True, 64.0)
    straight, resumed = FakeStep({3: skipped, 9: skipped}), FakeStep({3: skipped, 9: skipped})
    expected = whole(tmp_path / "a", step=straight)
    first = tmp_path / "a" / "checkpoints" / f"step-{step:06d}"
    again = whole(tmp_path / "b", step=resumed, resume=first)
    assert repr(curve(again)) == repr(curve(expected))  # repr: NaN is no NaN's equal
    assert resumed.weight.tobytes() == straight.weight.tobytes()
    assert resumed.v.tobytes() == straight.v.tobytes()
    assert len(resumed.rates) == 12 - step
    assert again.best is None or again.best.name == expected.best.name


def test_the_metrics_of_a_resumed_run_are_those_of_a_straight_one(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    whole(tmp_path / "b")
    whole(tmp_path / "b", resume=tmp_path / "b" / "checkpoints" / "step-000004")
    timeless = []
    for name in "ab":
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        timeless.append(
            [{k: v for k, v in line.items() if "second" not in k and "_s" not in k} for line in lines]
        )
    assert json.dumps(timeless[0]) == json.dumps(timeless[1])
    assert len(timeless[0]) == 12 + 4


class Stopping(FakeStep):
    """Gets SIGTERM, as it were, in the middle of step ``when``."""

    def __init__(self, when: int, stop: Any) -> None:
        super().__init__()
        self.when, self.stop = when, stop

    def step(self, micro: Any, lr: float) -> FakeResult:
        if self.steps + 1 == self.when:
            self.stop.name = "SIGTERM"
        return super().step(micro, lr)


@pytest.mark.parametrize("when", [1, 3, 5, 6, 12])
def test_stopped_anywhere_and_resumed(when: int, tmp_path: Path) -> None:
    """Steps 3, 6 and 12 are evaluated: the stop comes before that, the resumed run makes up for it."""
    expected = whole(tmp_path / "a")
    stop = Quiet()
    part = whole(tmp_path / "b", step=Stopping(when, stop), stop=stop)
    assert (part.reason, part.step, part.exit_code) == ("SIGTERM", when, 0)
    assert part.latest is not None and part.latest.name == f"step-{when:06d}"
    again = whole(tmp_path / "b", resume="latest")
    assert again.reason == "finished"
    assert curve(again) == curve(expected)
    assert again.best is not None and again.best.name == expected.best.name
    # Also the checkpoint of step 12 knows of the evaluation that came after it was written.
    assert again.latest is not None and expected.latest is not None
    ends = [load_checkpoint(folder).state for folder in (again.latest, expected.latest)]
    assert ends[0]["evaluations"] == ends[1]["evaluations"] and len(ends[0]["evaluations"]) == 4
    assert ends[0]["best_step"] == ends[1]["best_step"]


def test_a_stop_cuts_an_evaluation_short(tmp_path: Path) -> None:
    """It is not finished first, which may take long, and the resumed run does it anew."""
    expected, stop, step = whole(tmp_path / "a"), Quiet(), FakeStep()
    evaluate, read = step.evaluate, []

    def stopping(batch: Any) -> tuple[float, int]:
        read.append(batch)
        stop.name = "SIGTERM"
        return evaluate(batch)

    step.evaluate = stopping  # type: ignore[method-assign]
    part = whole(tmp_path / "b", step=step, stop=stop)
    assert (part.reason, part.step, len(read), part.history.evaluations) == ("SIGTERM", 3, 1, [])
    assert curve(whole(tmp_path / "b", resume="latest")) == curve(expected)


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    stop = Quiet()
    stop.name = "SIGINT"
    outcome = whole(tmp_path, stop=stop)
    assert (outcome.reason, outcome.step, outcome.latest, outcome.exit_code) == ("SIGINT", 0, None, 130)
    assert whole(tmp_path, resume="auto").step == 12


def test_resume_from_best(tmp_path: Path) -> None:
    high = {"schedule": Schedule(0.3, "linear", warmup_steps=11), "save_every": 100, "keep_last": 1}
    expected = whole(tmp_path, **high)
    best = expected.best
    assert best is not None and best.name != "step-000012"
    again = whole(tmp_path, resume="best", **high)
    assert curve(again) == curve(expected)
    names = sorted(path.name for path in best.parent.iterdir())
    assert names == [best.name, "step-000012", "step-000012.aside"]  # nothing was deleted for another course


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    more: dict[str, Any] = {"step": FakeStep(frozen=True), "eval_every": 2, "patience": 4, "save_every": 1}
    assert whole(tmp_path / "a", **more).step == 10
    first = tmp_path / "a" / "checkpoints" / "step-000005"
    again = whole(tmp_path / "b", **{**more, "step": FakeStep(frozen=True), "resume": first})
    assert (again.reason, again.step) == ("early stop", 10)
    # A patience that is already used up ends at once; more of it goes on.
    assert whole(tmp_path / "a", **more, resume="latest").step == 10
    assert whole(tmp_path / "a", **{**more, "patience": 9}, resume="latest").reason == "finished"


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    expected, step = whole(tmp_path), FakeStep()
    again = whole(tmp_path, resume="latest", step=step)
    assert again.reason == "finished" and step.rates == []
    assert curve(again) == curve(expected)


def test_more_steps_may_be_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path)
    again = whole(tmp_path, max_steps=14, save_every=7, log_every=1, keep_last=1, resume="latest")
    assert again.step == 14
    assert "changed since: loop.max_steps: 12 there, 14 now" in capsys.readouterr().err


CHANGED = {
    "accumulation": ({"accumulate": 1}, "loop.accumulate: 2 there, 1 now"),
    "schedule": ({"schedule": Schedule(0.06, warmup_steps=3)}, "loop.schedule.lr: 0.05 there, 0.06 now"),
    "evaluation": ({"evaluation": None}, "data.evaluation_batches: 2 there, null now"),
    "data": ({"batches": FakeBatches(6)}, "data.batches_per_epoch: 5 there, 6 now"),
    "a setting": ({"settings": {"lr": 2}}, "lr: 1 there, 2 now"),
    "a new setting": ({"settings": {"lr": 1, "lora": {"rank": 8}}}, "lora.rank: not set there, 8 now"),
    "settings first": ({"settings": {"lr": 2}, "accumulate": 1}, "other settings: lr: 1 there, 2 now. Give"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_setting_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, message = CHANGED[name]
    whole(tmp_path, max_steps=2)
    before = sorted(tmp_path.rglob("*"))
    arguments = {"batches": FakeBatches(5), "evaluation": FakeBatches(2), **MORE, "max_steps": 4, **changes}
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, resume="latest", **arguments)
    assert f"{tmp_path}/checkpoints/step-000002 was trained with other settings: " in str(caught.value)
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_may_change_are_the_callers_choice(tmp_path: Path) -> None:
    whole(tmp_path, settings={"lora": {"rank": 8}, "threads": 1})
    assert (
        whole(tmp_path, settings={"lora": {"rank": 8}, "threads": 2}, free={"threads"}, resume="latest").step
        == 12
    )


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no checkpoint in .* to resume from"):
        whole(tmp_path, resume="latest")
    with pytest.raises(TrainingError, match="no checkpoint nowhere; give latest, best, or the folder"):
        whole(tmp_path, resume="nowhere")
    train(tmp_path)
    with pytest.raises(TrainingError, match="knows of no best checkpoint: nothing was evaluated"):
        train(tmp_path, resume="best")


def test_the_best_is_gone(tmp_path: Path) -> None:
    high = {"schedule": Schedule(0.3, "linear", warmup_steps=11), "save_every": 100, "keep_last": 1}
    best = whole(tmp_path, **high).best
    assert best is not None
    shutil.rmtree(best)
    with pytest.raises(TrainingError, match=f"the best checkpoint, {best}, is gone"):
        whole(tmp_path, **high, resume="best")


def test_a_checkpoint_of_another_folder_does_not_mix_with_those_here(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    whole(tmp_path / "b")
    with pytest.raises(TrainingError, match="holds the checkpoints of another run"):
        whole(tmp_path / "b", resume=tmp_path / "a" / "checkpoints" / "step-000004")


def test_a_damaged_newest_checkpoint_is_refused_with_its_name(tmp_path: Path) -> None:
    outcome = whole(tmp_path)
    assert outcome.latest is not None
    (outcome.latest / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match="step-000012 is damaged: adapter_model.safetensors has 5 bytes"
    ):
        whole(tmp_path, resume="latest")
    assert whole(tmp_path, resume=outcome.latest.with_name("step-000010")).step == 12


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    whole(tmp_path, max_steps=2)
    left = tmp_path / "checkpoints" / "step-000004.tmp-12345"
    left.mkdir()
    (left / "half").write_text("x")
    whole(tmp_path, resume="latest")
    assert not left.exists()
