"""The command ``data``: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research.qwen.cli import main
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.data import DataOptions, open_dataset
from tests.train.data_files import talk, write_array, write_lines

TALKS = [talk("One?", "Eins."), talk("Two?", "Zwei " * 40), talk("Three?", "Drei.", "Four?", "Vier.")]
WITH_TOOLS = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["data", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_counts_and_shows_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "x.jsonl", [*TALKS, talk("never answered")])
    code, out, err = run(
        capsys, "check", path, "--max-length", 50, "--mask", "assistant", "--sample", 2, "--skip-bad"
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"file          {path}"
    assert lines[1] == "samples       3 (bad records left out: 1)"
    assert "117 an epoch, 41 learned (35.0%)" in lines[2]
    assert lines[3].startswith("length        least 26, ") and lines[3].endswith("most 50")
    assert lines[4].startswith("packing       3 rows of 50 tokens, 22.0% padding (one sample a row: 3 rows")
    assert lines[5].startswith("left out      line 4: conversations: there is no answer")
    assert lines[7].startswith("warning       1 of 3 samples have more than 50 tokens (the longest ")
    assert out.endswith(
        "sample 2, line 3: what is learned stands between ⟦ and ⟧\n\n"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n⟦Drei.<|im_end|>⟧\n"
        "<|im_start|>user\nFour?<|im_end|>\n<|im_start|>assistant\n⟦Vier.<|im_end|>⟧\n\n"
    )


def test_check_takes_vocabulary_and_window_from_the_model(
    tmp_path: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "x.jsonl", TALKS)
    code, out, _ = run(capsys, "check", path, "--model", demo_folder)
    window = json.loads((demo_folder / "config.json").read_text())["seq_length"]
    assert code == 0 and f"rows of {window:,} tokens" in out


def test_bad_records_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a"), talk("b"), *TALKS])
    code, out, err = run(capsys, "check", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: 2 of 5 records cannot be used\n{path}:1: ")
    code, _, err = run(capsys, "check", write_lines(path, TALKS), "--sample", 3)
    assert code == 2 and "--sample 3: the samples are 0 to 2" in err


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_convert_to_the_published_form(
    name: str, tmp_path: Path, tokenizer: QwenTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"instruction": "Say", "input": "this", "output": "This \ud83d."},
        {"id": "mine", "messages": [{"role": "system", "content": "S"}, *WITH_TOOLS["messages"]]},
        talk("Three?", "Drei."),
    ]
    source, target = write_array(tmp_path / "in.json", records), tmp_path / "out" / name
    assert run(capsys, "convert", source, target) == (0, f"3 samples written to {target}\n", "")
    text = target.read_text(encoding="utf-8")
    written = json.loads(text) if name == "out.json" else [json.loads(line) for line in text.splitlines()]
    assert written == [
        {"id": "identity_0", **talk("Say\nthis", "This \ud83d.")},
        {"id": "mine", "system": "S", **talk("q", "a")},
        {"id": "identity_2", **talk("Three?", "Drei.")},
    ]
    one, other = (open_dataset(path, tokenizer, DataOptions()) for path in (source, target))
    assert [one[n] for n in range(3)] == [other[n] for n in range(3)]
    code, _, err = run(capsys, "convert", source, target)
    assert code == 2 and "exists; choose another name, or --force" in err
    assert run(capsys, "convert", source, target, "--force")[0] == 0


def test_what_convert_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "x.jsonl", [WITH_TOOLS])
    for target, reason in (
        (tmp_path / "y.csv", "must end in .json or .jsonl (published form) or .mindrecord"),
        (source, "is the source itself"),
    ):
        code, _, err = run(capsys, "convert", source, target, "--force")
        assert code == 2 and reason in err
    code, _, err = run(capsys, "convert", tmp_path / "z.mindrecord", tmp_path / "y.json")
    assert code == 2 and "holds tokens, which cannot be told apart" in err
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    agent = {**WITH_TOOLS, "messages": [WITH_TOOLS["messages"][0], calls, result, WITH_TOOLS["messages"][1]]}
    code, _, err = run(capsys, "convert", write_lines(source, [agent]), tmp_path / "y.json")
    assert code == 2 and "x.jsonl:1: a conversation with tools has no published form" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.mindspore
def test_convert_to_mindrecord_and_check_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_lines(tmp_path / "x.jsonl", TALKS), tmp_path / "y.mindrecord"
    options = ("--max-length", 50, "--mask", "assistant")
    code, out, err = run(capsys, "convert", source, target, *options)
    assert (code, out) == (0, f"3 samples written to {target}\n")
    assert "warning: 1 of 3 samples have more than 50 tokens" in err
    one, other = (run(capsys, "check", path, *options)[1].splitlines() for path in (source, target))
    assert one[1:5] == other[1:5] and one[-4:] == other[-4:]


def test_help_says_what_files_look_like(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "check", "--help"])
    out = capsys.readouterr().out
    assert '"conversations": [{"from": "user"' in out and "--truncation {published,turns}" in out


@pytest.fixture(scope="module")
def tokenizer(published_vocab: Path) -> QwenTokenizer:
    return QwenTokenizer(published_vocab)
