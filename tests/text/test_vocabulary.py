"""Finding the vocabulary file, and every way in which it can be corrupt."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from research.qwen.errors import VocabularyError
from research.qwen.text.tokenizer import QwenTokenizer, find_vocab_file
from research.qwen.text.vocabulary import load_ranks
from tests.text.golden_files import vocab_lines

BYTES = [bytes((byte,)) for byte in range(256)]
GOOD = vocab_lines([*BYTES, b"ab"])


def test_explicit_path_wins(small_vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_TIKTOKEN", str(tmp_path / "other"))
    assert find_vocab_file(small_vocab) == small_vocab
    assert find_vocab_file(str(small_vocab.parent)) == small_vocab  # a folder stands for the file in it
    with pytest.raises(VocabularyError, match="nowhere"):
        find_vocab_file(tmp_path / "nowhere")


def test_folder_then_environment(small_vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.tiktoken"
    other.write_bytes(GOOD)
    monkeypatch.setenv("QWEN_TIKTOKEN", str(other))
    assert find_vocab_file(folder=small_vocab.parent) == small_vocab
    assert find_vocab_file(folder=tmp_path) == other
    monkeypatch.setenv("QWEN_TIKTOKEN", str(tmp_path / "gone"))
    with pytest.raises(VocabularyError, match="QWEN_TIKTOKEN"):
        find_vocab_file()


def test_package_is_the_last_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_TIKTOKEN", raising=False)
    found = find_vocab_file(folder=tmp_path)
    assert found.parts[-3:] == ("dashscope", "resources", "qwen.tiktoken")
    assert "dashscope" not in sys.modules


def test_nothing_found_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_TIKTOKEN", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VocabularyError, match=r"QWEN_TIKTOKEN.*pip install dashscope") as caught:
        find_vocab_file(folder=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (GOOD + b"YWJj! 257\n", ":258: bad base64 'YWJj!'"),
        (GOOD + b"YWJ 257\n", ":258: bad base64"),
        (GOOD + b"YWJj x\n", ":258: rank 'x' is not a number"),
        (GOOD + b"YWJj -1\n", ":258: rank '-1' is not a number"),
        (GOOD + b"YWJj\n", ":258: expected 'base64 rank', got 'YWJj'"),
        (GOOD + b"YWJj 257 1\n", ":258: expected 'base64 rank'"),
        (GOOD + b"YWJj 258\n", ":258: rank 258, but ranks must be 0..257 and 257 is missing"),
        (GOOD + b"YWJj 256\n", ":258: duplicate rank 256, first seen in line 257"),
        (GOOD + b"YWI= 257\n", ":258: duplicate token, first seen in line 257"),
        (vocab_lines(BYTES[:255]), "no token for the single byte 0xff"),
        (vocab_lines([*BYTES[1:], b"ab"]), "no token for the single byte 0x00"),
        (bytes(range(256)) * 8, ":1: "),
        (b"\x80\x02}q\x00.", ":1: expected 'base64 rank'"),
        (b"<html><body>not found</body></html>", ":1: "),
    ],
)
def test_corrupt_file(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(data)
    with pytest.raises(VocabularyError, match=re.escape(message)) as caught:
        QwenTokenizer(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_truncated_file(tmp_path: Path, small_vocab: Path) -> None:
    path = tmp_path / "cut.tiktoken"
    path.write_bytes(small_vocab.read_bytes()[:-9])
    with pytest.raises(VocabularyError, match=":260: "):
        QwenTokenizer(path)


def test_harmless_variations(tmp_path: Path) -> None:
    want = load_ranks_of(tmp_path, GOOD)
    lines = GOOD.splitlines(keepends=True)
    assert load_ranks_of(tmp_path, GOOD.replace(b"\n", b"\r\n")) == want
    assert load_ranks_of(tmp_path, GOOD.rstrip(b"\n")) == want
    assert load_ranks_of(tmp_path, b"\n" + GOOD + b"\n\n") == want
    assert load_ranks_of(tmp_path, b"".join(reversed(lines))) == want


def load_ranks_of(folder: Path, data: bytes) -> dict[bytes, int]:
    path = folder / "variation.tiktoken"
    path.write_bytes(data)
    return load_ranks(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"YWJj 464\n", ":1: id 464 is taken; additional ids start at 465"),
        (b"YWJj 465\nYWJk 465\n", ":2: duplicate"),
        (b"YWJj 465\nYWJj 466\n", ":2: duplicate"),
        (b"YWI= 465\n", ":1: duplicate"),
        (b"garbage\n", ":1: expected"),
    ],
)
def test_corrupt_additional_vocabulary(tmp_path: Path, line: bytes, message: str) -> None:
    base, extra = tmp_path / "base.tiktoken", tmp_path / "extra.tiktoken"
    base.write_bytes(GOOD)
    extra.write_bytes(line)
    with pytest.raises(VocabularyError, match=re.escape(str(extra) + message)):
        QwenTokenizer(base, extra_vocab_file=extra)
    with pytest.raises(VocabularyError, match="gone"):
        QwenTokenizer(base, extra_vocab_file=tmp_path / "gone")


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="cannot read the vocabulary"):
        load_ranks(tmp_path)  # a folder


@pytest.mark.slow
def test_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "for name in ('mindspore', 'mindformers', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from research.qwen.text import chatml, detokenizer, stop, tokenizer\n"
        "print(len(tokenizer.QwenTokenizer()), 'dashscope' in sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "QWEN_TIKTOKEN"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "151851 False", run.stderr
