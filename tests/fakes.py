"""Fakes with the real interfaces, so that decoding and the surfaces are tested in milliseconds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from research.qwen.decode.loop import Chunk


class FakeLM:
    """Logits are a hash of all tokens of the sequence as its cache blocks hold them, with the position and the
    alpha each was written with.

    A block that two sequences write, a wrong start, a lost token or a changed alpha changes the answer.
    """

    def __init__(self, num_blocks: int = 16, block_size: int = 4, vocab_size: int = 64, max_length: int = 48):
        self.vocab_size, self.max_length = vocab_size, max_length
        self.num_blocks, self.block_size = num_blocks, block_size
        self.hidden_size = min(8, vocab_size)
        self.cache = np.full(
            (num_blocks * block_size, 3), -1, np.int64
        )  # token, position, alpha of each slot
        self.passes: list[list[Chunk]] = []
        self.fail_at: int | None = None

    def rope_alpha(self, prompt_length: int) -> float:
        """3 for long prompts, so that a lost alpha is seen."""
        return 3.0 if prompt_length > 8 else 1.0

    def forward(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """As the protocol says; everything is written before anything is read, as the kernels do."""
        if self.fail_at is not None and len(self.passes) >= self.fail_at:
            raise RuntimeError("broken")
        self.passes.append(list(chunks))
        self._check_writers(chunks)
        slots = [self._slots(chunk, chunk.start + len(chunk.ids)) for chunk in chunks]
        for chunk, places in zip(chunks, slots, strict=True):
            self.write(places[chunk.start :], chunk.ids, chunk.start, chunk.alpha)
        rows = []
        for chunk, places in zip(chunks, slots, strict=True):
            end = len(places)
            rows += [self._row(places[: end - back], chunk.alpha) for back in range(chunk.logits - 1, -1, -1)]
        return np.stack(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    def hidden(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """(sum of chunk.logits, hidden_size): the first numbers of the row that ``forward`` gives."""
        return self.forward(chunks)[:, : self.hidden_size]

    def _check_writers(self, chunks: Sequence[Chunk]) -> None:
        """A block that one sequence writes is in no other's table."""
        for chunk in chunks:
            first, end = chunk.start // self.block_size, -(-(chunk.start + len(chunk.ids)) // self.block_size)
            written = set(chunk.blocks[first:end])
            others = {block for other in chunks if other is not chunk for block in other.blocks}
            assert not written & others, "a shared block is written"
            assert len(set(chunk.blocks)) == len(chunk.blocks), "a block stands twice in a table"

    def write(self, places: np.ndarray, ids: Sequence[int], start: int, alpha: float) -> None:
        """Put consecutive tokens into cache slots."""
        self.cache[places, 0] = ids
        self.cache[places, 1] = np.arange(start, start + len(ids))
        self.cache[places, 2] = int(alpha)

    def _slots(self, chunk: Chunk, length: int) -> np.ndarray:
        positions = np.arange(length)
        return (
            np.asarray(chunk.blocks)[positions // self.block_size] * self.block_size
            + positions % self.block_size
        )

    def _row(self, places: np.ndarray, alpha: float) -> np.ndarray:
        tokens = self.cache[places]
        assert (tokens >= 0).all(), "a position was never written"
        seed = zlib.crc32(tokens.tobytes() + bytes([int(alpha)]))
        return np.random.default_rng(seed).standard_normal(self.vocab_size).astype(np.float32)
