"""Two processes on MindSpore's own engine make the steps that one makes with the rows of both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.qwen.errors import KernelError, TrainingError
from research.qwen.model.parallel import World, join_world
from tests.train import distributed_worker

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]
WORKER = Path(distributed_worker.__file__)
OPTIONS = "--max-steps 3 --lora-rank 4 --lora-dropout 0 --accumulation 1 --learning-rate 1e-3 --warmup-ratio 0".split()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(repository) -> dict[str, str]:
    """PATH with this Python's own commands first, since msrun starts ``python``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(repository),
        "QWEN_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def files(repository) -> list[str]:
    """Base model and data of the runs through the command."""
    data = repository / "tests" / "fixtures" / "finetune" / "dialogues.json"
    return ["--model", str(repository / "research" / "qwen" / "demo" / "model"), "--train-data", str(data)]


def kill(processes) -> None:
    """End these processes and all they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def started(repository, folder):
    """The two processes, and the script for users; none outlives the tests, whatever happens."""
    msrun = [
        str(Path(sys.executable).parent / "msrun"),
        "--worker_num=2",
        "--local_worker_num=2",
        "--join=True",
    ]
    msrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--log_dir={folder / 'log'}"]
    script = [str(repository / "scripts" / "msrun_finetune.sh"), "2", *files(repository), *OPTIONS]
    commands = {
        "two": [*msrun, "--cluster_time_out=60", str(WORKER), str(folder)],
        "script": [*script, "--batch-size", "2", "--output", "out"],
    }
    env = environment(repository)
    env |= {"MASTER_PORT": str(free_port()), "LOG_DIR": str(folder / "script")}
    processes = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.txt").open("w") as output:
                processes[name] = subprocess.Popen(
                    command, cwd=folder, env=env, start_new_session=True, stdout=output, stderr=output
                )
        yield processes
    finally:
        kill(processes.values())


def finished(process, folder, name) -> str:
    """What a process wrote; it has to end well."""
    code = process.wait(150)
    text = (folder / f"{name}.txt").read_text(errors="replace")
    logs = [path.read_text(errors="replace")[-2000:] for path in folder.glob("*/worker_*.log")]
    assert code == 0, text + "\n".join(logs)
    return text


@pytest.fixture(scope="module")
def results(started, folder):
    """What the two processes wrote, and what this one makes of all rows meanwhile."""
    distributed_worker.main(folder)
    finished(started["two"], folder, "two")
    return {name: dict(np.load(folder / f"rank{name}.npz")) for name in ("0of2", "1of2", "0of1")}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_equal_one(results, method):
    """Losses, norms and counts of every step, and the weights behind the last, rows shared out unevenly."""
    alone, both = results["0of1"], results["0of2"]
    got, want = both[f"{method}/results"], alone[f"{method}/results"]
    assert np.array_equal(got[:, 2:], want[:, 2:])
    assert np.abs(got[:, :2] / want[:, :2] - 1).max() < 2e-5, (got, want)
    assert want[0, 2] == 2 * (22 + 17 + 3 + 1)
    names = [name for name in alone if name.startswith(f"{method}/weight:")]
    assert len(names) > 10
    for name in names:
        assert np.abs(both[name] - alone[name]).max() < 5e-5, name


def test_the_processes_hold_the_same_weights(results):
    one, other = results["0of2"], results["1of2"]
    assert set(one) == set(other)
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_overflow_in_one_process_skips_the_step_in_all(results, method):
    for name in ("0of2", "1of2", "0of1"):
        assert results[name][f"{method}/overflow"].tolist() == [True, True], name


def test_sums_of_float64_are_exact(results):
    assert results["0of2"]["total"].tolist() == [np.pi + np.pi * 1e9, 2 * (1 + 1e-15), np.inf]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_the_script_trains_as_one_command_with_twice_the_rows(started, repository, folder):
    """The same samples in the same order: rows of both processes together are those of one with twice the batch."""
    from research.qwen.cli import main

    alone = folder / "alone"
    assert main(["finetune", *files(repository), *OPTIONS, "--batch-size", "4", "--output", str(alone)]) == 0
    told = finished(started["script"], folder, "script")
    assert "of 2 x 1 x 2 rows" in told and "out/adapter" in told
    got, want = losses(folder / "out"), losses(alone)
    assert len(got) == len(want) == 3 and np.abs(np.array(got) - want).max() < 1e-4, (got, want)
    assert (folder / "out" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["x"], {}, "number of processes must be a whole number"),
        (["2"], {"NODES": "2"}, "MASTER_ADDR, the address of the machine"),
        (["2"], {"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be a whole number from 0 to 1"),
        (["2"], {"MASTER_PORT": "80"}, "MASTER_PORT must be"),
        (["2"], {"PYTHON": "no-such-python"}, "no no-such-python; set PYTHON"),
    ],
)
def test_the_script_checks_its_arguments(repository, arguments, variables, message):
    script = str(repository / "scripts" / "msrun_finetune.sh")
    kept = {name: value for name, value in os.environ.items() if name not in ("NODES", "MASTER_ADDR")}
    done = subprocess.run([script, *arguments], env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_processes_without_the_device_they_want(monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(KernelError, match="finds no Ascend device"):
        join_world("ascend")
    monkeypatch.setenv("MS_WORKER_NUM", "1")
    assert join_world("ascend").world == 1


def test_gradients_of_another_kind_are_refused():
    with pytest.raises(TrainingError, match="gradient of w is no contiguous float32"):
        World(0, 2, lambda flat: flat).add({"w": np.ones((2, 2), np.float64)})
