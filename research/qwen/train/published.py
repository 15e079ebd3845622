"""Conversations of any known form in the published one, as a file other trainers read too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from research.qwen.errors import DataError
from research.qwen.train.data import ConversationDataset
from research.qwen.train.rendering import Dialogue
from research.qwen.weights.outputs import OutputSet

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def write_published(dataset: ConversationDataset, out: Path, force: bool = False) -> int:
    """Write all conversations, as one array or (``.jsonl``) one a line; the file appears whole. Returns how many.

    A system message other than ``dataset.options.system`` becomes the key ``system``, which our reader knows.

    Raises:
        DataError: a conversation with tools, whose results and open answers the published form cannot tell apart.
        CheckpointError: the file exists and ``force`` is not set, or it cannot be written.
    """
    lines = out.suffix == ".jsonl"
    end = "\n" if lines else ""

    def fill(stream: BinaryIO) -> None:
        for number, record in enumerate(_records(dataset)):
            separator = "" if lines else "[\n" if number == 0 else ",\n"
            stream.write(f"{separator}{_json(record)}{end}".encode())
        if not lines:
            stream.write(b"\n]\n")

    with OutputSet(out.absolute().parent, force) as output:
        output.write(out.name, fill)
    return len(dataset)


def _records(dataset: ConversationDataset) -> Iterator[dict[str, Any]]:
    for number in range(len(dataset)):
        dialogue = dataset.dialogue(number)
        if not _is_plain(dialogue):
            raise DataError(
                f"{dataset.path}:{dataset.line(number)}: a conversation with tools has no published form; convert "
                f"it to .mindrecord, or train on it as it is"
            )
        system, *turns = dialogue
        record: dict[str, Any] = {"id": dataset.identity(number) or f"identity_{number}"}
        if system.content != dataset.options.system:
            record["system"] = system.content
        yield record | {"conversations": [{"from": turn.role, "value": turn.content} for turn in turns]}


def _json(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    # A lone surrogate has no UTF-8 form, only an escape.
    return json.dumps(record) if _SURROGATE.search(text) else text


def _is_plain(dialogue: Dialogue) -> bool:
    """Whether it is a system turn, then the user's and the assistant's, and answers are learned wholly."""
    return dialogue[0].role == "system" and all(
        turn.role == "user" or (turn.words == ((0, len(turn.content)),) and turn.closed)
        for turn in dialogue[1:]
    )
