"""Everything that needs no device imports with MindSpore, MindFormers, torch and transformers blocked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_layers import HEAVY, light_modules

PROBE = """
import importlib, json, sys
heavy, modules = json.loads(sys.argv[1])
for name in heavy:
    sys.modules[name] = None  # import of it raises ModuleNotFoundError
failed = {}
for name in modules:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def import_blocked(modules: list[str], root: Path) -> dict[str, str]:
    """Import ``modules`` in a fresh interpreter without the heavy packages; what failed, and why."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([HEAVY, modules])],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    failed: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return failed


@pytest.mark.slow
def test_light_modules_import_without_the_heavy_packages(repository: Path) -> None:
    modules = light_modules(repository)
    assert {"research.qwen.config", "research.qwen.kernels.api", "research.qwen.cli"} <= set(modules)
    assert import_blocked(modules, repository) == {}


def test_the_probe_really_blocks(tmp_path: Path) -> None:
    for number, name in enumerate(HEAVY):
        (tmp_path / f"probe_{number}.py").write_text(f"import {name}.something\n")
    probes = [f"probe_{number}" for number in range(len(HEAVY))]
    assert set(import_blocked(probes, tmp_path)) == set(probes)
