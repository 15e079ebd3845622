"""``--lora`` of the commands that answer here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from research.qwen.cli import main
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from tests.lora_fixtures import saved_adapter

pytestmark = pytest.mark.mindspore
OPTIONS = ["--device", "cpu", "--greedy", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapters") / "poet", demo_folder(), 1, 0.2)


def generated(capsys: pytest.CaptureFixture[str], *more: str) -> list[int]:
    capsys.readouterr()
    assert main(["generate", str(demo_folder()), "-p", "你好", "--json", *OPTIONS, *more]) == 0
    ids: list[int] = json.loads(capsys.readouterr().out)["ids"]
    return ids


def test_generate(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_it = generated(capsys, "--lora", str(adapter))
    assert with_it == generated(capsys, "--lora", f"any={adapter}") != generated(capsys)
    assert main(["generate", str(demo_folder()), "-p", "你好", *OPTIONS, "--lora", str(adapter)]) == 0
    shown = capsys.readouterr().out
    engine = Engine.from_pretrained(demo_folder(), num_blocks=16)
    assert engine.tokenizer is not None
    assert shown == engine.tokenizer.decode(with_it, skip_special_tokens=True) + "\n"


def test_chat(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("你是谁？\n"))
        capsys.readouterr()
        assert main(["chat", str(demo_folder()), *OPTIONS, *more]) == 0
        return capsys.readouterr().out

    assert said("--lora", str(adapter)) != said() != ""


def test_info(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "rank          4; factor 2" in shown and "15 matrices" in shown and "beside them   none" in shown


def test_mistakes(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str) -> str:
        assert main(list(argv)) == 2
        return capsys.readouterr().err

    twice = ("--lora", f"a={adapter}", "--lora", f"b={adapter}")
    assert "one adapter" in fails("generate", str(demo_folder()), "-p", "x", *twice)
    assert "one adapter" in fails("chat", str(demo_folder()), *twice)
    assert "no such adapter" in fails("generate", str(demo_folder()), "-p", "x", "--lora", "nowhere")
    assert "is a LoRA adapter and no model" in fails("generate", str(adapter), "-p", "x")
    assert "--lora loads a model here" in fails("chat", "--url", "http://127.0.0.1:9", "--lora", str(adapter))
