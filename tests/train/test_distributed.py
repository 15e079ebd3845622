"""Two processes on MindSpore's own engine make the steps that one makes with the rows of both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]
WORKER = Path(__file__).with_name("distributed_worker.py")


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


@pytest.fixture(scope="module")
def results(repository, tmp_path_factory):
    """What the two processes and the lone one wrote. Whatever happens, no process outlives the test."""
    folder = tmp_path_factory.mktemp("distributed")
    msrun = [
        str(Path(sys.executable).parent / "msrun"),
        "--worker_num=2",
        "--local_worker_num=2",
        "--join=True",
    ]
    msrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--log_dir={folder / 'log'}"]
    commands = [
        [*msrun, "--cluster_time_out=60", str(WORKER), str(folder)],
        [sys.executable, str(WORKER), str(folder)],
    ]
    env = environment(repository)
    started = [subprocess.Popen(c, cwd=folder, env=env, start_new_session=True) for c in commands]
    try:
        codes = [process.wait(120) for process in started]
    finally:
        for process in started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("log/worker_*.log"))
    assert codes == [0, 0], logs
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
