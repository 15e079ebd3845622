"""One choice of a request while it waits or runs, and the piece of it that goes through one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.blocks import block_hash, root_hash
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import Sampler, token_logprob
from research.qwen.messages import FinishReason, TokenLogprob


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive tokens of one sequence in one forward pass."""

    ids: Sequence[int]  # the new tokens
    start: int  # position of the first = tokens of the sequence already cached
    blocks: Sequence[int]  # cache blocks of the sequence, enough for start + len(ids) tokens
    alpha: float  # NTK factor, frozen at the first prefill
    logits: int  # how many last rows of logits are wanted, from none to len(ids)
    adapter: str = ""  # name of the low-rank adapter these tokens go through; empty: the base model alone


@dataclass(eq=False)
class RunningSequence:
    """Ids and cache of one choice. ``scores`` collects the log-probabilities of the prompt where they are asked for."""

    key: int
    choice: int
    ids: list[int]
    prompt_length: int
    params: SamplingParams
    end_ids: frozenset[int]
    stop_sequences: tuple[tuple[int, ...], ...]
    sampler: Sampler
    alpha: float
    salt: str = ""
    adapter: str = ""
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    scores: list[TokenLogprob | None] | None = None
    started: bool = False
    preempted: bool = False
    reused: int = 0  # prompt tokens found in the cache when it was read for the first time
    _hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None and self.choice == 0:
            self.scores = [None]

    @property
    def pending(self) -> int:
        """Ids not yet computed: one while decoding, more in a prefill."""
        return len(self.ids) - self.cached

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to come: then every token must be computed."""
        return self.scores is not None and len(self.scores) < self.prompt_length

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first ``count`` full blocks; ids never change, so each is computed once."""
        while len(self._hashes) < count:
            done = len(self._hashes)
            parent = self._hashes[-1] if done else root_hash(self.alpha, self.salt, self.adapter)
            self._hashes.append(block_hash(parent, self.ids[done * block_size : (done + 1) * block_size]))
        return self._hashes[:count]

    def rows_wanted(self, count: int) -> int:
        """Of the next ``count`` tokens, how many last ones need their logits."""
        if self.scores is not None and self.scoring:
            return max(0, self.cached + count - max(self.cached, len(self.scores) - 1))
        return int(count == self.pending and self.params.max_new_tokens != 0)

    def score(self, rows: NDArray[np.float32], end: int) -> None:
        """Take log-probabilities of prompt tokens from ``rows``, the logits of the positions just before ``end``."""
        if self.scores is None or not self.scoring:
            return
        top = self.params.prompt_logprobs or 0
        for place, row in enumerate(rows, end - len(rows) + 1):
            if place < self.prompt_length:
                self.scores.append(token_logprob(row, self.ids[place], top))

    def ending(self, room: int) -> FinishReason | None:
        """Why the answer is complete with its newest id, if it is; ``room`` is the longest it can become."""
        new = len(self.ids) - self.prompt_length
        # The sampler bans end ids before the least length, unless there is nothing else to say.
        if self.ids[-1] in self.end_ids or (new >= self.params.min_new_tokens and self._at_stop(new)):
            return "stop"
        if new == self.params.max_new_tokens or len(self.ids) >= room:
            return "length"
        return None

    def _at_stop(self, new: int) -> bool:
        return any(len(stop) <= new and tuple(self.ids[-len(stop) :]) == stop for stop in self.stop_sequences)
