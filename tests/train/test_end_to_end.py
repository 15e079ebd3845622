"""The whole way: the demo model learns ten dialogues by LoRA, is merged, converted, served, and answers them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from research.qwen.cli import main
from tests.serve.processes import ServerProcess, server_process

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]

DIALOGUES = Path(__file__).resolve().parents[1] / "fixtures" / "finetune" / "dialogues.json"
STEPS = 40


def conversations() -> list[list[dict[str, str]]]:
    """Each as OpenAI messages."""
    roles = {"user": "user", "assistant": "assistant"}
    records = json.loads(DIALOGUES.read_text(encoding="utf-8"))
    return [
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        for record in records
    ]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command ``finetune``. The demo's vocabulary has bytes it never saw, so its embeddings learn too."""
    from research.qwen.demo import demo_folder

    folder = tmp_path_factory.mktemp("finetuned")
    options = {
        "--model": demo_folder(),
        "--train-data": DIALOGUES,
        "--eval-data": DIALOGUES,
        "--output": folder,
        "--device": "CPU",
        "--max-steps": STEPS,
        "--eval-steps": STEPS // 2,
        "--batch-size": 10,
        "--accumulation": 1,
        "--learning-rate": 5e-3,
        "--lora-alpha": 64,
        "--lora-dropout": 0,
        "--mask": "assistant",
        "--log-steps": 20,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["finetune", *words, "--no-recompute", "--modules-to-save", "wte", "lm_head"]) == 0
    return folder


@pytest.fixture(scope="module")
def server(output: Path) -> Iterator[ServerProcess]:
    """Merged, converted and served."""
    from research.qwen.demo import demo_folder

    merged, converted = output / "merged", output / "converted" / "qwen.safetensors"
    assert main(["merge", str(demo_folder()), str(output / "adapter"), str(merged), "-q"]) == 0
    assert main(["convert", "--torch_ckpt_dir", str(merged), "--mindspore_ckpt_path", str(converted)]) == 0
    with server_process("research.qwen.cli serve", str(converted)) as process:
        process.ready()
        yield process


def test_the_run_leaves_what_it_says(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["reason"] == "finished" and summary["steps"] == STEPS
    assert summary["loss"]["first"] > 5 and summary["loss"]["last"] < 0.05
    assert summary["evaluation"]["last"]["loss"] < 0.05
    assert (output / "metrics.jsonl").is_file() and any((output / "tensorboard").iterdir())
    adapter = sorted(path.name for path in (output / "adapter").iterdir())
    assert adapter == ["adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"]
    config = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (64, 64, ["wte", "lm_head"])
    assert sorted(config["target_modules"]) == ["c_attn", "c_proj", "w1", "w2"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-000020", "step-000040"]


def ask(server: ServerProcess, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def test_the_server_answers_what_was_learned(server: ServerProcess) -> None:
    asked = 0
    for messages in conversations():
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                choice = ask(server, messages[:place])
                assert (choice["message"]["content"], choice["finish_reason"]) == (message["content"], "stop")
                asked += 1
    assert asked == 11


def test_nothing_of_it_was_known_before(demo_folder: Path) -> None:
    known = (demo_folder.parent / "dialogues.json").read_text(encoding="utf-8")
    for messages in conversations():
        assert not any(message["content"] in known for message in messages)
