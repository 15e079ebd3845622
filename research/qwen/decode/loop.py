"""Many sequences decoded together over a paged cache. Knows ids, logits and blocks; nothing of text or devices.

One ``step`` is one forward pass: the next token of every running sequence, and within a budget of tokens the next
piece of prompts still to be read. Waiting requests are admitted first come, first served, while blocks suffice. If
blocks run out, the sequence admitted last gives its own up and is computed again later from all ids it has, with
the NTK factor it was given at first, so nothing of its text changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import LogitsProcessor, Sampler
from research.qwen.errors import PromptError, RequestError
from research.qwen.messages import FinishReason, TokenLogprob


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive tokens of one sequence in one forward pass."""

    ids: Sequence[int]  # the new tokens
    start: int  # position of the first = tokens of the sequence already cached
    blocks: Sequence[int]  # cache blocks of the sequence, enough for start + len(ids) tokens
    alpha: float  # NTK factor, frozen at the first prefill
    logits: int  # how many last rows of logits are wanted: 0, 1 or len(ids)


class LanguageModel(Protocol):
    """What the loop needs of a model (``model.runtime.Runtime`` is one)."""

    vocab_size: int
    max_length: int
    num_blocks: int
    block_size: int

    def rope_alpha(self, prompt_length: int) -> float:
        """NTK factor of a sequence whose prompt has this many tokens."""

    def forward(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """(sum of chunk.logits, vocab_size) float32, rows in chunk order."""


class BlockPool:
    """The blocks of the cache that nobody uses."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))

    @property
    def free_blocks(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def alloc(self, count: int) -> list[int] | None:
        """``count`` blocks, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        self._free.extend(blocks)


@dataclass(frozen=True)
class Event:
    """A new token of choice ``choice`` of request ``key``; the last one of a choice has a finish reason.

    ``ends_text`` marks a token that only ends the answer (an end or stop id) and is no part of its text.
    """

    key: int
    choice: int
    token: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    ends_text: bool = False


@dataclass(eq=False)
class RunningSequence:
    """One choice of a request: its ids, how many of them are cached, and where."""

    key: int
    choice: int
    ids: list[int]
    prompt_length: int
    params: SamplingParams
    end_ids: frozenset[int]
    stop_sequences: tuple[tuple[int, ...], ...]
    sampler: Sampler
    alpha: float
    cached: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Ids not yet computed: one while decoding, more in a prefill."""
        return len(self.ids) - self.cached


class GenerationLoop:
    """See the module. Not thread-safe: callers take turns.

    Args:
        max_batch: sequences that run at once.
        prefill_chunk: prompt tokens read in one step, over all sequences.
        use_cache: False computes every sequence from its first token at each step; the text is the same.
    """

    def __init__(
        self, lm: LanguageModel, *, max_batch: int = 16, prefill_chunk: int = 512, use_cache: bool = True
    ):
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        self.lm, self.max_batch, self.prefill_chunk, self.use_cache = lm, max_batch, prefill_chunk, use_cache
        self.pool = BlockPool(lm.num_blocks)
        self._waiting: deque[RunningSequence] = deque()
        self._running: list[RunningSequence] = []  # in the order of admission
        self._last_key = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._running or self._waiting)

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int] = (),
        *,
        stop_sequences: Sequence[Sequence[int]] = (),
        processors: Sequence[LogitsProcessor] = (),
    ) -> int:
        """Queue a request; its key. ``params.n`` choices run as sequences of their own.

        Args:
            eos_ids: the model's own end ids (``params.ignore_eos`` switches them off).
            stop_sequences: id sequences that end an answer once it ends with one; they stay part of it.
            processors: applied to every row of logits, see ``sampling.LogitsProcessor``.
        Raises:
            PromptError: the prompt is empty, has ids outside the vocabulary, or cannot fit into context or cache
                however long it waits.
        """
        prompt = self._check(prompt_ids)
        self._last_key += 1
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)
        for choice in range(params.n):
            self._waiting.append(
                RunningSequence(
                    key=self._last_key,
                    choice=choice,
                    ids=list(prompt),
                    prompt_length=len(prompt),
                    params=params,
                    end_ids=end_ids,
                    stop_sequences=tuple(tuple(stop) for stop in stop_sequences if len(stop)),
                    sampler=Sampler(params, prompt, choice=choice, processors=processors),
                    alpha=self.lm.rope_alpha(len(prompt)),
                )
            )
        return self._last_key

    def cancel(self, key: int, choice: int | None = None) -> None:
        """End a request, or one choice of it, without further events; its blocks are free at once."""
        for sequence in [s for s in self._running if s.key == key and choice in (None, s.choice)]:
            self._release(sequence)
        kept = (s for s in self._waiting if s.key != key or choice not in (None, s.choice))
        self._waiting = deque(kept)

    def step(self) -> list[Event]:
        """One forward pass; the new tokens. An empty list while prompts are still being read.

        If the model or the sampler fails, all requests end, their blocks are freed and the error goes on.
        """
        try:
            self._admit()
            work = self._plan()
            if not work:
                return []
            rows = self.lm.forward([chunk for _, chunk in work])
            events, row = [], 0
            for sequence, chunk in work:
                sequence.cached = chunk.start + len(chunk.ids)
                if chunk.logits:
                    events.append(self._advance(sequence, rows[row]))
                    row += 1
            return events
        except BaseException:
            for sequence in list(self._running):
                self._release(sequence)
            self._waiting.clear()
            raise

    @property
    def _room(self) -> int:
        """Tokens one sequence may have: the context, or all of the cache where that is smaller."""
        return min(self.lm.max_length, self.lm.num_blocks * self.lm.block_size)

    def _check(self, prompt_ids: Sequence[int]) -> list[int]:
        prompt = [int(token) for token in prompt_ids]
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        # One bad id would fail the forward pass, and with it every request in it.
        bad = next((token for token in prompt if not 0 <= token < self.lm.vocab_size), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.lm.vocab_size} rows")
        if len(prompt) >= self.lm.max_length:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and leaves no room: the context holds {self.lm.max_length}"
            )
        if len(prompt) >= self._room:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and leaves no room: the cache holds {self._room} "
                f"({self.lm.num_blocks} blocks of {self.lm.block_size}); raise num_blocks"
            )
        return prompt

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            needed = self._blocks_for(len(self._waiting[0].ids))
            # A spare block for each sequence already running: else the newcomer may be the next to be preempted.
            if self.pool.free_blocks < needed + len(self._running):
                return
            blocks = self.pool.alloc(needed)
            if blocks is None:
                return
            sequence = self._waiting.popleft()
            sequence.blocks = blocks
            self._running.append(sequence)

    def _plan(self) -> list[tuple[RunningSequence, Chunk]]:
        """The chunks of this step: every decoding sequence, and prompts as far as the budget goes."""
        for sequence in list(self._running):
            self._grow(sequence)
        work, budget = [], self.prefill_chunk
        for sequence in self._running:
            if not self.use_cache:
                sequence.cached = 0
            count = sequence.pending
            if count > 1 and self.use_cache:
                count = min(count, budget)
                budget -= count
            if count:
                ids = sequence.ids[sequence.cached : sequence.cached + count]
                last = int(count == sequence.pending)
                chunk = Chunk(ids, sequence.cached, tuple(sequence.blocks), sequence.alpha, last)
                work.append((sequence, chunk))
        return work

    def _grow(self, sequence: RunningSequence) -> None:
        """Give a sequence the blocks its ids need, from those admitted last if there are no others."""
        while sequence in self._running:
            missing = self._blocks_for(len(sequence.ids)) - len(sequence.blocks)
            blocks = self.pool.alloc(max(missing, 0))
            if blocks is not None:
                sequence.blocks += blocks
                return
            victim = self._running[-1]
            self._release(victim)
            self._waiting.appendleft(victim)

    def _advance(self, sequence: RunningSequence, logits: NDArray[np.float32]) -> Event:
        """Sample the next token of a sequence; a finished one leaves."""
        token, logprob = sequence.sampler.next(logits, sequence.ids)
        sequence.ids.append(token)
        new = len(sequence.ids) - sequence.prompt_length
        ends = token in sequence.end_ids
        reason: FinishReason | None = None
        if ends or self._at_stop_sequence(sequence, new):
            reason = "stop"
        elif new == sequence.params.max_new_tokens or len(sequence.ids) >= self._room:
            reason = "length"
        if reason is not None:
            self._release(sequence)
        return Event(sequence.key, sequence.choice, token, logprob, reason, ends)

    @staticmethod
    def _at_stop_sequence(sequence: RunningSequence, new: int) -> bool:
        return any(
            len(stop) <= new and tuple(sequence.ids[-len(stop) :]) == stop for stop in sequence.stop_sequences
        )

    def _release(self, sequence: RunningSequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.cached = [], 0
        self._running.remove(sequence)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.lm.block_size)
