"""What a run leaves behind: metrics, TensorBoard events (read back with tensorboardX's messages), picture, summary."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import TrainingError
from research.qwen.train import report as report_module
from research.qwen.train.history import Evaluation, History, Record
from research.qwen.train.progress import Bar, Lines, Pace, Silent, clock, display
from research.qwen.train.report import NO_MATPLOTLIB, Report, config_hash, draw, smoothed, summarise
from research.qwen.train.tensorboard import EventWriter, crc32c
from tests.train.fake_training import FakeBatches, FakeStep, train


def record(loss: float = 2.0, **changes: Any) -> Record:
    values = {
        "epoch": 0.5, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens": 10, "seen": 20, "seconds": 0.5,
        "overflow": False, "loss_scale": 1.0,
    }  # fmt: skip
    return Record(**{**values, **changes})


def history(count: int) -> History:
    out = History()
    for number in range(count):
        out.add(record(3.0 / (number + 1)) if number != 2 else record(math.nan, overflow=True))
    out.evaluations.append(Evaluation(min(2, count), 1.5))
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_a_line_a_step_at_once(tmp_path: Path) -> None:
    report = Report(tmp_path, History())
    report.step(1, record())
    report.evaluated(Evaluation(1, 1.0))
    assert lines(tmp_path) == [
        {
            "step": 1, "epoch": 0.5, "loss": 2.0, "lr": 1e-4, "grad_norm": 0.5, "tokens": 10, "seen": 20,
            "seconds": 0.5, "overflow": False, "loss_scale": 1.0, "tokens_per_s": 40.0,
        },
        {"step": 1, "eval_loss": 1.0, "perplexity": math.e},
    ]  # fmt: skip
    report.close()


def test_a_resumed_report_begins_with_the_history(tmp_path: Path) -> None:
    first = Report(tmp_path, History())
    for number in range(1, 6):
        first.step(number, record(9.0))
    first.close()
    second = Report(tmp_path, history(3))
    second.step(4, record(0.25))
    second.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 2, 3, 4]
    assert [line.get("loss") for line in found] == [3.0, 1.5, None, None, 0.25]


READ_EVENTS = """
import json, sys
sys.modules["torch"] = None  # tensorboardX imports it where it can, which takes seconds
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.crc32c import crc32c
for file in sys.argv[1:]:
    data, place = open(file, "rb").read(), 0
    while place < len(data):
        length = int.from_bytes(data[place:place + 8], "little")
        body = data[place + 12:place + 12 + length]
        for part, at in ((data[place:place + 8], place + 8), (body, place + 12 + length)):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert masked == int.from_bytes(data[at:at + 4], "little"), at
        event, place = Event.FromString(body), place + 16 + length
        values = {value.tag: value.simple_value for value in event.summary.value}
        print(json.dumps([event.step, event.file_version, event.session_log.status, event.wall_time > 1e9, values]))
"""


@pytest.mark.slow
def test_events_are_what_tensorboard_reads(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.add(1, {"train/loss": 2.5, "train/语": -0.0})
    writer.add(300, {"train/loss": 1e39})
    writer.close()
    EventWriter(tmp_path, first_step=200).close()
    files = sorted(map(str, tmp_path.glob("events.out.tfevents.*")))
    run = subprocess.run(
        [sys.executable, "-c", READ_EVENTS, *files], capture_output=True, text=True, check=True, timeout=60
    )
    assert [json.loads(line) for line in run.stdout.splitlines()] == [
        [0, "brain.Event:2", 0, True, {}],
        [1, "", 1, True, {}],
        [1, "", 0, True, {"train/loss": 2.5, "train/语": -0.0}],
        [300, "", 0, True, {"train/loss": math.inf}],
        [0, "brain.Event:2", 0, True, {}],
        [200, "", 1, True, {}],
    ]


def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the polynomial's definition
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"") == 0


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, after the checksum of every chunk was compared."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place = 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 4 : place + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(data[place + 8 + length : place + 12 + length], "big")
        place += 12 + length
    assert kind == b"IEND"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 40])
def test_the_loss_curve(count: int, tmp_path: Path) -> None:
    with (tmp_path / "loss.png").open("wb") as stream:
        draw(history(count), stream)
    assert png_size(tmp_path / "loss.png") == (990, 550)


def test_without_matplotlib_there_is_a_note_and_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    notes: list[str] = []
    report = Report(tmp_path, History())
    report.finish(history(3), {"steps": 3}, notes.append)
    report.close()
    assert notes == [NO_MATPLOTLIB] and "qwen-mindspore[finetune]" in NO_MATPLOTLIB
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    ]


def test_smoothing_has_no_pull_from_its_start_and_skips_what_is_no_number() -> None:
    assert smoothed(np.array([4.0, 4.0, math.nan, 4.0])) == pytest.approx([4.0] * 4)
    two = smoothed(np.array([1.0, 2.0]))
    assert two[1] == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / (0.19))
    assert math.isnan(smoothed(np.array([math.nan]))[0])


def test_the_summary_of_a_whole_run(tmp_path: Path) -> None:
    held_out = FakeBatches(2, seed=9)
    outcome = train(tmp_path, settings={"lr": 1, "base": Path("q")}, evaluation=held_out, eval_every=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == outcome.summary
    losses = outcome.history.column("loss")
    assert (summary["reason"], summary["error"], summary["steps"], summary["planned_steps"]) == (
        "finished",
        None,
        12,
        12,
    )
    assert summary["epochs"] == 2.4
    assert summary["tokens_learned"] == summary["tokens_seen"] == 12 * 13
    assert summary["loss"] == {"first": losses[0], "last": losses[-1], "mean_of_last_10": losses[-10:].mean()}
    assert summary["evaluation"]["best"]["loss"] == min(one.loss for one in outcome.history.evaluations)
    assert summary["checkpoints"]["latest"].endswith("checkpoints/step-000012")
    assert summary["config"]["base"] == "q" and summary["config"]["loop"]["schedule"]["lr"] == 0.05
    assert summary["config_hash"] == config_hash(summary["config"])
    assert summary["versions"]["numpy"] == np.__version__
    assert summary["seconds"] >= summary["step_seconds"] >= 0


def test_the_hash_depends_on_values_and_not_on_their_order() -> None:
    assert config_hash({"a": 1, "b": [1]}) == config_hash({"b": (1,), "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_a_summary_of_nothing() -> None:
    summary = summarise(History(), {}, reason="SIGTERM")
    assert summary["loss"] == {"first": None, "last": None, "mean_of_last_10": None}
    assert summary["evaluation"] is None and summary["tokens_per_s"] is None


def test_a_resumed_run_replaces_the_events_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Noting(EventWriter):
        def __init__(self, folder: Path, first_step: int) -> None:
            begun.append(first_step)
            super().__init__(folder, first_step)

    monkeypatch.setattr(report_module, "EventWriter", Noting)
    for count in (0, 3):
        Report(tmp_path, history(count) if count else History()).close()
    assert begun == [1, 4]


def test_events_can_be_left_out(tmp_path: Path) -> None:
    train(tmp_path, tensorboard=False)
    assert not (tmp_path / "tensorboard").exists()
    train(tmp_path / "b")
    assert len(list((tmp_path / "b" / "tensorboard").iterdir())) == 1


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(tmp_path, History())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report._events, "flush", full)
    with pytest.raises(TrainingError, match="report in .* could not be written: .*No space left"):
        report.step(1, record())
    report.close()
    monkeypatch.setattr(report_module, "draw", full)
    with pytest.raises(TrainingError, match="disk full while writing"):
        report.finish(history(2), {}, lambda note: None)


def test_plain_lines_at_intervals() -> None:
    stream = io.StringIO()
    shown = display(stream, 4)
    assert isinstance(shown, Lines)
    shown.start(10, 0)
    for number in range(1, 11):
        shown.step(
            number, record(float(number), overflow=number == 8, loss_scale=64.0 if number == 8 else 1.0)
        )
    shown.evaluated(Evaluation(10, 0.5), True)
    shown.note("done")
    text = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in text[:4]] == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert [line.split("  ")[2] for line in text[:4]] == [
        "loss 1.0000",
        "loss 3.0000",
        "loss 6.5000",
        "loss 9.5000",
    ]
    assert "lr 1.00e-04  grad 0.500  40 tokens/s" in text[0] and "eta" not in text[0]
    assert "overflow, scale 64" in text[2] and "eta 0:00:00" in text[3]
    assert text[4:] == ["step 10: evaluation loss 0.5000, perplexity 1.649 (best so far)", "done"]


def test_a_stream_nobody_reads_ends_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    Lines(Closed(), 1).note("text")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    shown = display(stream, 4)
    assert isinstance(shown, Bar)
    shown.start(10, 3)
    for number in range(4, 11):
        shown.step(number, record())
    shown.note("saved")
    shown.close()
    assert "10/10" in stream.getvalue() and "saved\n" in stream.getvalue()
    assert "loss 2.0000  lr 1.00e-04  grad 0.500" in stream.getvalue()


def test_other_ranks_say_and_write_nothing(tmp_path: Path) -> None:
    assert isinstance(display(Terminal(), 1, rank=1), Silent)


def test_the_pace_leaves_out_the_step_that_compiles() -> None:
    pace = Pace()
    assert (pace.tokens_per_s, pace.seconds_per_step) == (None, None)
    pace.add(record(seen=20, seconds=10.0), 100.0)
    assert (pace.tokens_per_s, pace.seconds_per_step) == (2.0, None)
    for place in range(30):
        pace.add(record(seen=20), 102.0 + 2 * place)
    assert pace.tokens_per_s == pytest.approx(10.0) and pace.seconds_per_step == pytest.approx(2.0)


def test_the_clock() -> None:
    assert [clock(value) for value in (0, 59.6, 3723, 360000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:03",
        "100:00:00",
    ]


def test_histories_survive_and_broken_ones_are_refused() -> None:
    before = history(4)
    after = History.restored(before.arrays(), [[2, 1.5]])
    assert repr(list(after.records())) == repr(list(before.records()))
    assert after.evaluations == before.evaluations
    with pytest.raises(Exception, match="history of steps is incomplete"):
        History.restored({"loss": np.zeros(2)}, [])


def test_a_failed_run_still_has_a_summary_and_the_first_error(tmp_path: Path) -> None:
    step = FakeStep()
    step.evaluate = lambda batch: (math.nan, 3)  # type: ignore[method-assign]
    with pytest.raises(TrainingError):
        train(tmp_path, step, evaluation=FakeBatches(1), eval_every=5)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5
