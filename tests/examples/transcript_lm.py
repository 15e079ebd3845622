"""A language model that says the rest of a given transcript, wherever in it the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.loop import Chunk
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.text.tokenizer import QwenTokenizer


class TranscriptLM:
    """What stands behind the last ``<|im_start|>assistant\\n`` must be a beginning of the transcript."""

    block_size, num_blocks, max_length, hidden_size = 16, 256, 4096, 8

    def __init__(self, tokenizer: QwenTokenizer, transcript: str):
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)
        self.transcript = tokenizer.encode(transcript)
        self.header = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
        self.cache = np.zeros(self.num_blocks * self.block_size, np.int64)  # the token in each slot

    def rope_alpha(self, prompt_length: int) -> float:
        """Not used here."""
        return 1.0

    def forward(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """(rows, V): 100 for the one token that follows."""
        rows = []
        for chunk in chunks:
            end = chunk.start + len(chunk.ids)
            slots = [
                chunk.blocks[place // self.block_size] * self.block_size + place % self.block_size
                for place in range(end)
            ]
            self.cache[slots[chunk.start :]] = chunk.ids
            known = [int(token) for token in self.cache[slots]]
            rows += [self._row(known[: end - back]) for back in range(chunk.logits - 1, -1, -1)]
        return np.stack(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """(rows, hidden_size): ones."""
        return np.ones_like(self.forward(chunks)[:, : self.hidden_size])

    def _row(self, ids: list[int]) -> NDArray[np.float32]:
        row = np.zeros(self.vocab_size, np.float32)
        row[self._next(ids)] = 100.0
        return row

    def _next(self, ids: list[int]) -> int:
        starts = [n for n, token in enumerate(ids) if token == self.tokenizer.im_start_id]
        said = ids[starts[-1] + len(self.header) :] if starts else []
        assert said == self.transcript[: len(said)], "the prompt is not a beginning of the transcript"
        return self.transcript[len(said)] if len(said) < len(self.transcript) else self.tokenizer.im_end_id


def transcript_engine(transcript: str) -> Engine:
    """An engine over the demo vocabulary that says this transcript."""
    tokenizer = QwenTokenizer(demo_folder() / "qwen.tiktoken")
    return Engine(TranscriptLM(tokenizer, transcript), tokenizer, generation={"chat_format": "chatml"})
