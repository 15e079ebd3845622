"""Signals in a real process: one saves and ends in order, a second ends at once, also where handlers are replaced."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from research.qwen.train.signals import SAME_SECONDS, StopSignals
from tests.train.fake_training import curve, train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# Trains the fake; the third step takes a while. Every step replaces the handlers behind Python's back by the
# deadly default, as MindSpore replaces them by its own.
SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from research.qwen.train.signals import StopSignals
with StopSignals() as stop:
    from tests.train.fake_training import FakeStep, train
    libc = ctypes.CDLL(None)
    class Slow(FakeStep):
        def step(self, micro, lr):
            for number in (2, 15):
                libc.signal(number, 0)
            print(self.steps + 1, flush=True)
            time.sleep(float(sys.argv[2]) if self.steps == 2 else 0)
            return super().step(micro, lr)
    outcome = train(Path(sys.argv[1]), Slow(), max_steps=1000, save_every=2, stop=stop)
sys.exit(outcome.exit_code)
"""


@contextmanager
def training(output: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of its third step."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(output), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would everything it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            while process.stdout.readline() != "3\n":
                assert process.poll() is None
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_one_signal_finishes_the_step_saves_and_ends(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    with training(tmp_path, 0.3) as process:
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)  # at once again, as `timeout` does: the same wish
        _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert f"{number.name}: this step is finished, then all is saved" in shown
    assert "Traceback" not in shown
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-000002", "step-000003"]
    assert json.loads((tmp_path / "summary.json").read_text())["reason"] == number.name
    # What was saved goes on as if nothing had been.
    again = train(tmp_path, max_steps=1000, save_every=500, resume="latest")
    assert curve(again) == curve(train(tmp_path / "straight", max_steps=1000, save_every=500))


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with training(tmp_path, 30.0) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(SAME_SECONDS + 0.3)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in shown
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    with training(tmp_path, 30.0) as process:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    again = train(tmp_path, max_steps=1000, save_every=500, resume="latest")
    assert curve(again) == curve(train(tmp_path / "straight", max_steps=1000, save_every=500))


OLDER_THREAD = """
import ctypes, signal, threading, time
from research.qwen.train.signals import StopSignals
waiting = threading.Event()
older = threading.Thread(target=waiting.wait, daemon=True)
older.start()
with StopSignals() as stop:
    ctypes.CDLL(None).signal(signal.SIGTERM, 0)
    stop.restore()
    signal.pthread_kill(older.ident, signal.SIGTERM)
    for _ in range(100):
        if stop.name:
            break
        time.sleep(0.05)
print(stop.name, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_thread_older_than_the_block_may_take_the_signal() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OLDER_THREAD], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    # Afterwards all is as it was.
    assert (ended.returncode, ended.stdout) == (0, "SIGTERM True set()\n"), ended.stderr
    assert "SIGTERM: this step is finished" in ended.stderr


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def use() -> None:
        with StopSignals() as stop:
            stop.restore()
            seen.append((stop.name, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(10)
    assert seen == [(None, before)]
