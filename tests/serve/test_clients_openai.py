"""openai-python against a served demo model: the newest version in this process, 1.x in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.serve import clients_openai
from tests.serve.clients_openai import CHECKS

pytestmark = pytest.mark.mindspore


@pytest.mark.parametrize("name", CHECKS)
def test_newest(demo_server: str, name: str) -> None:
    assert openai.__version__.startswith("3.")
    CHECKS[name](demo_server)


@pytest.fixture(scope="module")
def results_of_1(demo_server: str) -> dict[str, str | None]:
    folder = Path(sys.prefix) / "openai-1"
    assert (folder / "openai").is_dir(), f"{folder} is missing: `make test` installs openai 1.x there"
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    argv = [sys.executable, clients_openai.__file__, demo_server]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["version"].startswith("1.")
    results: dict[str, str | None] = answer["results"]
    return results


@pytest.mark.parametrize("name", CHECKS)
def test_1(results_of_1: dict[str, str | None], name: str) -> None:
    assert results_of_1[name] is None, results_of_1[name]
