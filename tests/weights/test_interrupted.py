"""A run that is stopped half-way leaves nothing that looks finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research.qwen.errors import CheckpointError
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder

ROOT = Path(__file__).resolve().parents[2]
# Converts, but after some blocks of the weights says so and waits to be stopped.
STALLING = """
import sys, time
from research.qwen.weights import readers
from research.qwen.weights.command import main
blocks, seen = readers.Checkpoint.blocks, []

def stalling(self, name):
    seen.append(name)
    if len(seen) == 9:
        print("half-way", flush=True)
        time.sleep(600)
    return blocks(self, name)

readers.Checkpoint.blocks = stalling
sys.exit(main(sys.argv[1:]))
"""


def stop(args: list[str], number: signal.Signals) -> tuple[int, str]:
    """Run, send the signal half-way; exit code and stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", STALLING, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would everything it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "half-way\n"
            run.send_signal(number)
            _, err = run.communicate(timeout=60)
            return run.returncode, err
        finally:
            run.kill()


def arguments(kind: str, out: Path) -> list[str]:
    """A conversion to ``out``."""
    source = ["--torch_ckpt_dir", str(model_folder("st_new_bf16"))]
    if kind == "folder":
        return [*source, "--export", "qwen2", "--output", str(out / "folder")]
    return [*source, "--mindspore_ckpt_path", str(out / f"q.{kind}")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["ckpt", "folder"])
def test_asked_to_stop(kind: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    got, err = stop(arguments(kind, tmp_path / "out"), number)
    assert got == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "folder"])
def test_killed(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    got, _ = stop(arguments(kind, out), signal.SIGKILL)
    assert got == -signal.SIGKILL
    left = [path for path in out.rglob("*") if path.is_file()]
    assert left, "the test should have stopped it while files were being written"
    assert all(".tmp-" in str(path.relative_to(out)) for path in left)
    with pytest.raises(CheckpointError):
        open_checkpoint(out)
    with pytest.raises(CheckpointError):
        open_checkpoint(out / "folder" if kind == "folder" else out / f"q.{kind}")
