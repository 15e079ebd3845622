"""Options of ``serve``: what they become, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from research.qwen.cli import COMMANDS
from research.qwen.cli import main as command
from research.qwen.cli.serve import build_parser, check, load, main, settings_from
from research.qwen.errors import ConfigError


def test_the_command_is_listed() -> None:
    assert "serve" in COMMANDS


def test_defaults_are_safe() -> None:
    args = build_parser().parse_args([])
    settings = settings_from(args)
    assert (args.host, args.port) == ("127.0.0.1", 8000)
    assert settings.model_names == ("qwen-demo",)
    assert settings.api_keys == settings.cors_origins == ()
    assert not settings.any_model and not settings.open_metrics
    assert settings.default_max_tokens is None and settings.root_path == ""


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("b\n")
    monkeypatch.setenv("QWEN_API_KEY", "c")
    line = f"{tmp_path}/Qwen-7B-Chat --api-key a --api-key-file {tmp_path}/keys --max-body 0.5 --grace 3 --ping 0"
    line += " --cors-origin https://x.example --root-path /llm/ --default-max-tokens 100 --open-metrics --any-model"
    settings = settings_from(build_parser().parse_args(line.split()))
    assert settings.model_names == ("Qwen-7B-Chat",)
    assert settings.api_keys == ("a", "b", "c")
    assert (settings.max_body, settings.grace, settings.ping_seconds) == (2**19, 3.0, 0.0)
    assert (settings.cors_origins, settings.root_path) == (("https://x.example",), "/llm")
    assert (settings.default_max_tokens, settings.open_metrics, settings.any_model) == (100, True, True)
    named = build_parser().parse_args(["--served-model-name", "a", "--served-model-name", "b"])
    assert settings_from(named).model_names == ("a", "b")


@pytest.mark.parametrize(
    ("line", "checked"),
    [
        ("", True),
        ("--host localhost", True),
        ("--host ::1 --allowed-host a.example", True),
        ("--api-key a", False),
        ("--host 0.0.0.0", False),
        ("--host my.machine", False),
    ],
)
def test_host_names_are_checked_where_nothing_else_protects(line: str, checked: bool) -> None:
    settings = settings_from(build_parser().parse_args(line.split()))
    assert settings.check_host == checked
    assert settings.allowed_hosts == (("a.example",) if "a.example" in line else ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max-batch 0", "--max-batch must be at least 1, got 0"),
        ("--max-queue 0", "--max-queue"),
        ("--max-model-len 1", "--max-model-len"),
        ("--stretch 1", "--stretch must be at least 1.1, got 1.0"),
        ("--grace -1", "--grace"),
        ("--grace nan", "--grace"),
        ("--max-body 0", "--max-body"),
        ("--port 70000", "--port must be from 0 to 65535"),
        ("--root-path llm", "--root-path must begin with /"),
        ("--api-key-file /nowhere/keys", "/nowhere/keys cannot be read"),
    ],
)
def test_values_that_make_no_sense(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=message):
        args = build_parser().parse_args(line.split())
        check(args)
        settings_from(args)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["serve", "--max-batch", "0"]) == 2
    assert capsys.readouterr().err == "error: --max-batch must be at least 1, got 0\n"


@pytest.mark.parametrize("missing", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}.*pip install 'qwen-mindspore\[serve\]'"):
        main([])


class Loaded:
    """The part of an engine that loading looks at."""

    class lm:  # noqa: N801
        max_length = 100


def test_the_context_can_be_made_shorter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from research.qwen.cli import serve

    asked: dict[str, object] = {}
    monkeypatch.setattr(serve, "load_engine", lambda args, **options: asked.update(options) or Loaded)
    monkeypatch.setattr("research.qwen.scheduler.Scheduler", lambda engine, **options: options)
    line = "--max-model-len 50 --max-batch 3 --num-blocks 7 --max-queue 9 --stretch 3".split()
    engine, scheduler = load(build_parser().parse_args(line))
    assert engine.lm.max_length == 50
    assert asked == {"max_batch": 3, "prefill_chunk": 512, "num_blocks": 7}
    assert scheduler == {"max_queue": 9, "stretch": 3.0}
    with pytest.raises(ConfigError, match="--max-model-len is 51, the model has 50"):
        load(build_parser().parse_args(["--max-model-len", "51"]))
