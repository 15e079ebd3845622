"""The command, a real model, real data, a real signal: stopped and resumed, the same numbers as without a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research.qwen.cli import main
from research.qwen.demo import demo_folder
from research.qwen.train.checkpoints import load_checkpoint

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "fixtures" / "finetune" / "dialogues.json"


def arguments(output: Path, *more: str) -> list[str]:
    """LoRA with dropout, several batches a step, packed rows, and an evaluation apart from the checkpoints."""
    text = "--device CPU --max-steps 9 --batch-size 2 --accumulation 2 --packing --max-length 64 --lora-dropout 0.1 "
    text += "--learning-rate 3e-3 --save-steps 4 --eval-steps 2 --log-steps 1 --lora-rank 4"
    files = ["--model", demo_folder(), "--train-data", DATA, "--eval-data", DATA, "--output", output]
    return ["finetune", *map(str, files), *text.split(), *more]


def course(output: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")}
        for line in lines
    ]


def stopped(output: Path, number: signal.Signals, after: int, *more: str) -> tuple[int, str]:
    """A run in a process of its own that gets the signal after a step; exit code, and what it showed."""
    with subprocess.Popen(
        [sys.executable, "-m", "research.qwen.cli", *arguments(output, *more)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would everything it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stderr is not None
            shown = ""
            for line in process.stderr:
                shown += line
                if line.startswith(f"step {after}/"):
                    process.send_signal(number)
            return process.wait(60), shown
        finally:
            process.kill()


def test_stopped_resumed_and_stopped_again_it_is_the_same_course(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(arguments(straight, "--save-steps", "1", "--keep", "20")) == 0
    code, shown = stopped(broken, signal.SIGTERM, 3)
    assert code == 0, shown
    first = len([line for line in course(broken) if "loss" in line])
    assert 3 <= first < 6 and f"step-{first:06d}" in shown
    code, shown = stopped(broken, signal.SIGINT, 6, "--resume", "latest")
    assert code == 130, shown
    second = len([line for line in course(broken) if "loss" in line])
    assert 6 <= second < 9 and f"resumed from {broken}/checkpoints/step-{first:06d}" in shown
    expected = course(straight)
    # An evaluation that was due at the very end is made up for by the next run.
    assert course(broken) == expected[: len(course(broken))]
    name = f"step-{second:06d}"
    ends = [load_checkpoint(output / "checkpoints" / name) for output in (broken, straight)]
    for name, values in ends[0].arrays.items():
        if name.startswith("model/"):
            assert values.tobytes() == ends[1].arrays[name].tobytes(), name
