"""The embedded demo model through every door of this surface: a model that knows its answers and its vocabulary."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mindspore

BOOKS = "比较适合深度学习入门的书籍有"


@pytest.fixture(scope="module")
def demo_ckpt(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from research.qwen.weights.command import main

    target = tmp_path_factory.mktemp("demo") / "qwen_demo.ckpt"
    source = str(repository / "research" / "qwen" / "demo" / "model")
    assert main(["--torch_ckpt_dir", source, "--mindspore_ckpt_path", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def dialogues(repository: Path) -> list[list[list[str]]]:
    file = repository / "research" / "qwen" / "demo" / "dialogues.json"
    return [entry["turns"] for entry in json.loads(file.read_text(encoding="utf-8"))["dialogues"]]


def answer_to(dialogues: list[list[list[str]]], question: str) -> str:
    return next(turns[0][1] for turns in dialogues if turns[0][0] == question)


def test_make_demo_prints_the_answer(
    mf: Any, demo_ckpt: Path, dialogues: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from research.qwen.run_qwen_7b import main

    monkeypatch.chdir(tmp_path)
    yaml_file = str(demo_ckpt.with_suffix(".yaml"))
    assert main(["--config", yaml_file, "--load_checkpoint", str(demo_ckpt), "--predict_data", BOOKS]) == 0
    captured = capsys.readouterr()
    (entry,) = ast.literal_eval(captured.out.splitlines()[-1])
    (text,) = entry["text_generation_text"]
    assert answer_to(dialogues, BOOKS).removeprefix(BOOKS) in text and "<|" not in text
    assert captured.err == "" and list(tmp_path.iterdir()) == []


def test_trainer_finds_the_vocabulary_beside_the_checkpoint(
    mf: Any, demo_ckpt: Path, dialogues: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindformers import Trainer

    monkeypatch.chdir(tmp_path)
    trainer = Trainer(args=str(demo_ckpt.with_suffix(".yaml")), task="text_generation")
    result = trainer.predict(input_data=BOOKS, predict_checkpoint=str(demo_ckpt), do_sample=False)
    assert answer_to(dialogues, BOOKS).removeprefix(BOOKS) in result[0]["text_generation_text"][0]


def test_chat_holds_every_dialogue(mf: Any, demo_ckpt: Path, dialogues: Any) -> None:
    """Whole conversations, each answer ended by the model itself: the room for more tokens is never used up."""
    from research.qwen.mf.chat import chat

    model = mf.QwenForCausalLM.from_pretrained(demo_ckpt)
    tokenizer = mf.QwenTokenizer.from_pretrained(demo_ckpt.parent)
    assert len(tokenizer) == model.shape.vocab_size == 1024
    assert len(dialogues) > 10
    for turns in dialogues:
        history: list[tuple[str, str]] = []
        for question, answer in turns:
            response, history = chat(model, tokenizer, question, history, do_sample=False, max_new_tokens=256)
            assert response == answer
        assert history == [tuple(turn) for turn in turns]
