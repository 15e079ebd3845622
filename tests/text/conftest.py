"""The published vocabulary, and a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.qwen.text.tokenizer import QwenTokenizer
from tests.text.golden_files import vocab_lines


@pytest.fixture(scope="session")
def tokenizer() -> QwenTokenizer:
    return QwenTokenizer()


@pytest.fixture(scope="session")
def small_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid vocabulary of 260 tokens: the 256 bytes and four merges."""
    path = tmp_path_factory.mktemp("vocab") / "qwen.tiktoken"
    path.write_bytes(vocab_lines([*(bytes((byte,)) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]))
    return path
