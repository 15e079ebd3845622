"""Writing small data files, and reading the golden ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "finetune"


def golden() -> list[dict[str, Any]]:
    """56 conversations with the ids and labels of the published preparation."""
    with gzip.open(FIXTURES / "preprocess.jsonl.gz", "rt", encoding="ascii") as file:
        return [json.loads(line) for line in file]


def talk(*texts: str) -> dict[str, Any]:
    """A record in the published form: user and assistant by turns."""
    return {
        "conversations": [
            {"from": ("user", "assistant")[n % 2], "value": text} for n, text in enumerate(texts)
        ]
    }


def write_array(path: Path, records: Sequence[Any], **options: Any) -> Path:
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """One record a line; a text is taken as the line itself."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
