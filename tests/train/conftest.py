"""The published vocabulary for tests of training data."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.qwen.text.tokenizer import QwenTokenizer


@pytest.fixture(scope="session")
def tokenizer(published_vocab: Path) -> QwenTokenizer:
    return QwenTokenizer(published_vocab)
