"""What comes in as a prompt: texts, ids, messages; and the vocabulary that reads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.qwen.errors import RequestError
from research.qwen.messages import Message
from research.qwen.text.tokenizer import QwenTokenizer

Prompt = str | Sequence[int]

log = logging.getLogger(__name__)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def as_message(message: Message | Mapping[str, Any], place: int) -> Message:
    """A message as a value; RequestError, naming its ``place``, for an unknown role or a content that is no text."""
    if isinstance(message, Message):
        return message
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"messages[{place}].role is {role!r}; use system, user, assistant or tool")
    if not isinstance(content, str):
        raise RequestError(f"messages[{place}].content must be a string, got {type(content).__name__}")
    return Message(role, content)


def find_tokenizer(vocab_file: str | Path | None, folder: Path, rows: int) -> QwenTokenizer | None:
    """The checkpoint's vocabulary; None if only the published one is at hand and has more tokens than the model."""
    from research.qwen.errors import VocabularyError
    from research.qwen.text.tokenizer import find_vocab_file

    try:
        tokenizer = QwenTokenizer(find_vocab_file(vocab_file, folder))
    except VocabularyError as error:
        if vocab_file is not None or (folder / "qwen.tiktoken").exists():
            raise
        log.warning("no vocabulary: prompts are token ids. %s", error)
        return None
    if len(tokenizer) > rows:
        if vocab_file is not None or (folder / "qwen.tiktoken").exists():
            raise VocabularyError(
                f"{tokenizer.vocab_file} has {len(tokenizer)} tokens, the model only {rows} rows: not its vocabulary"
            )
        log.warning("the published vocabulary does not fit a model of %d rows: prompts are token ids", rows)
        return None
    return tokenizer
