"""Reading the golden files of the tokenizer, and making vocabulary files."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"


def golden(name: str) -> list[dict[str, Any]]:
    """The objects of one golden file."""
    with gzip.open(FIXTURES / f"{name}.jsonl.gz", "rt", encoding="ascii") as file:
        return [json.loads(line) for line in file]


def golden_vocab() -> dict[str, Any]:
    """Sizes, special ids and sample tokens of the published vocabulary."""
    with gzip.open(FIXTURES / "vocab.json.gz", "rt", encoding="ascii") as file:
        vocab: dict[str, Any] = json.load(file)
    return vocab


def vocab_lines(tokens: list[bytes]) -> bytes:
    """A vocabulary file with these tokens at ranks 0, 1, 2, ..."""
    return b"".join(b"%s %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens))
