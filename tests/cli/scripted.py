"""A language model that answers every chat prompt with a fixed text, for tests of the surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from research.qwen.decode.loop import Chunk
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.text.tokenizer import QwenTokenizer


class ScriptedLM:
    """Behind the last ``<|im_start|>assistant\\n`` it says ``answer`` and ends; ``on_token`` may interrupt it."""

    block_size, num_blocks, max_length = 16, 64, 512

    def __init__(self, tokenizer: QwenTokenizer, answer: str):
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.answer = tokenizer.encode(answer)
        self.header = len(tokenizer.encode("assistant")) + len(tokenizer.encode("\n")) + 1
        self.prompts: list[list[int]] = []
        self.interrupt_after: int | None = None
        self._cache: dict[int, list[int]] = {}

    def rope_alpha(self, prompt_length: int) -> float:
        """Not used here."""
        return 1.0

    def forward(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """One-hot logits of the scripted continuation."""
        rows = []
        for chunk in chunks:
            known = self._cache.setdefault(chunk.blocks[0], [])
            del known[chunk.start :]
            known += [int(i) for i in chunk.ids]
            for back in range(chunk.logits, 0, -1):
                rows.append(self._row(known[: len(known) - back + 1]))
        return np.stack(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    def _row(self, ids: list[int]) -> np.ndarray:
        start = len(ids) - ids[::-1].index(self.tokenizer.im_start_id) - 1 + self.header
        said = len(ids) - start
        if said == 0:
            self.prompts.append(ids)
        if self.interrupt_after is not None and said >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt
        row = np.zeros(self.vocab_size, np.float32)
        row[self.answer[said] if said < len(self.answer) else self.tokenizer.im_end_id] = 100.0
        return row


def scripted_engine(answer: str) -> Engine:
    """An engine over the demo vocabulary that always answers the same."""
    tokenizer = QwenTokenizer(Path(demo_folder()) / "qwen.tiktoken")
    return Engine(ScriptedLM(tokenizer, answer), tokenizer, generation={"chat_format": "chatml"})
