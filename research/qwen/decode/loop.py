"""Many sequences decoded together over a paged cache. Knows ids, logits and blocks; nothing of text or devices.

One ``step`` is one forward pass: the next token of every running sequence, and within a budget of tokens the next
piece of prompts still to be read. Requests are served first come, first served: waiting ones are admitted in their
order while blocks suffice, and the budget goes to the oldest prompt first. If blocks run out, the sequence
admitted last gives its own up, waits before all that never ran, and is computed again from all ids it has, with the
NTK factor it was given at first, so nothing of its text changes. The oldest sequence is never the victim of
another, and no sequence needs more than the whole cache: so the oldest always gets on and ends, then the next.

With ``prefix_caching`` a full block, once computed, is found by every later sequence that begins with the same
tokens; of two that run at once the younger waits for the older one's blocks instead of computing them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.blocks import BlockPool
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import LogitsProcessor, Sampler
from research.qwen.decode.schedule import Counters, Limits, Schedule, Work
from research.qwen.decode.sequence import Chunk as Chunk
from research.qwen.decode.sequence import RunningSequence
from research.qwen.errors import PromptError, RequestError
from research.qwen.messages import FinishReason, TokenLogprob

NO_TOKEN = -1

Processors = Sequence[LogitsProcessor] | Callable[[int], Sequence[LogitsProcessor]]


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

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """(sum of chunk.logits, hidden_size) float32: the hidden states from which ``forward`` makes these rows."""


@dataclass(frozen=True)
class Event:
    """A new token of choice ``choice`` of request ``key``; the last one of a choice has a finish reason.

    ``ends_text`` marks a token that only ends the answer (an end or stop id) and is no part of its text; NO_TOKEN
    comes where none was asked for. ``cached_tokens`` of the prompt were found in the cache. An ``error`` ends the
    whole request.
    """

    key: int
    choice: int
    token: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    ends_text: bool = False
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    error: Exception | None = None


class GenerationLoop:
    """See the module. Not thread-safe: callers take turns.

    Args:
        max_batch: sequences that run at once.
        prefill_chunk: prompt tokens read in one step, over all sequences.
        mixed_chunk: the same while other sequences decode, so that a long prompt does not stall them; None is
            ``prefill_chunk``.
        use_cache: False computes every sequence from its first token at each step; the text is the same.
        prefix_caching: keep full blocks for sequences that begin alike. Only for a model whose weights stay.
        isolate: True: what fails in a request or a pass ends the requests concerned, by events that carry the
            error. False: it is raised, and all requests end.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_batch: int = 16,
        prefill_chunk: int = 512,
        mixed_chunk: int | None = None,
        use_cache: bool = True,
        prefix_caching: bool = False,
        isolate: bool = False,
    ):
        mixed = prefill_chunk if mixed_chunk is None else mixed_chunk
        for name, value in (
            ("max_batch", max_batch),
            ("prefill_chunk", prefill_chunk),
            ("mixed_chunk", mixed),
        ):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        self.lm, self.isolate = lm, isolate
        caching = prefix_caching and use_cache
        limits = Limits(max_batch, prefill_chunk, min(mixed, prefill_chunk), use_cache, caching)
        self.pool = BlockPool(lm.num_blocks)
        self.schedule = Schedule(self.pool, lm.block_size, limits)
        self._last_key = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.schedule.running or self.schedule.waiting)

    @property
    def running(self) -> int:
        """How many sequences run."""
        return len(self.schedule.running)

    @property
    def waiting(self) -> int:
        """How many sequences wait for their turn."""
        return len(self.schedule.waiting)

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self.schedule.counters

    @property
    def last_step(self) -> tuple[int, int]:
        """How many single tokens, and how many tokens of prompts, the last step computed."""
        return self.schedule.decoded, self.schedule.read

    def limit_mixed(self, tokens: int) -> None:
        """Read at most so many prompt tokens in a step in which others decode; 0: for now none."""
        if tokens < 0:
            raise RequestError(f"mixed_chunk must be at least 0, got {tokens}")
        limits = self.schedule.limits
        self.schedule.limits = replace(limits, mixed_chunk=min(tokens, limits.prefill_chunk))

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int] = (),
        *,
        stop_sequences: Sequence[Sequence[int]] = (),
        processors: Processors = (),
        cache_salt: str = "",
        adapter: str = "",
    ) -> int:
        """Queue a request; its key. ``params.n`` choices run as sequences of their own.

        Args:
            eos_ids: the model's own end ids (``params.ignore_eos`` switches them off).
            stop_sequences: id sequences that end an answer once it ends with one; they stay part of it.
            processors: applied to every row of logits, see ``sampling.LogitsProcessor``; or a function that makes
                those of a choice from its number, where they have state.
            cache_salt: only requests with the same one share cached prompts.
            adapter: name of the low-rank adapter the model computes with; different ones share nothing either.
        Raises:
            PromptError, RequestError: as ``check``.
        """
        prompt = self.check(prompt_ids, params, adapter)
        self._last_key += 1
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)
        for choice in range(params.n):
            chain = processors(choice) if callable(processors) else processors
            sequence = RunningSequence(
                key=self._last_key,
                choice=choice,
                ids=list(prompt),
                prompt_length=len(prompt),
                params=params,
                end_ids=end_ids,
                stop_sequences=tuple(tuple(stop) for stop in stop_sequences if len(stop)),
                sampler=Sampler(params, prompt, choice=choice, processors=chain, end_ids=end_ids),
                alpha=self.lm.rope_alpha(len(prompt)),
                salt=cache_salt,
                adapter=adapter,
            )
            self.schedule.waiting.append(sequence)
        return self._last_key

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str = "") -> list[int]:
        """The prompt as a list of int; may be called from any thread.

        Raises:
            PromptError: the prompt is empty, has ids outside the vocabulary, or cannot fit into context or cache
                however long it waits.
            RequestError: the parameters name ids outside the vocabulary, or there is no such adapter.
        """
        prompt = [int(token) for token in prompt_ids]
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        # One bad id would fail the forward pass, and with it every request in it.
        bad = next((token for token in prompt if not 0 <= token < self.lm.vocab_size), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.lm.vocab_size} rows")
        least = len(prompt) + (params.max_new_tokens != 0)
        if least > self.lm.max_length:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and leaves no room: the context holds {self.lm.max_length}"
            )
        if least > self._room:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and leaves no room: the cache holds {self._room} "
                f"({self.lm.num_blocks} blocks of {self.lm.block_size}); raise num_blocks"
            )
        _check_named_ids(params, self.lm.vocab_size)
        loaded = getattr(self.lm, "adapters", ())
        if adapter and adapter not in loaded:
            raise RequestError(f"there is no adapter {adapter!r}; loaded: {', '.join(loaded) or 'none'}")
        return prompt

    def cancel(self, key: int, choice: int | None = None) -> None:
        """End a request, or one choice of it, without further events; its blocks are free at once."""
        self.schedule.remove(key, choice)

    def take_blocks(self, count: int) -> list[int]:
        """Blocks for a computation beside the loop; sequences admitted last give theirs up where none are free.

        Give them back with ``pool.free``. Raises PromptError if the cache has no ``count`` blocks at all.
        """
        return self.schedule.take_blocks(count)

    def step(self) -> list[Event]:
        """One forward pass; the new tokens. An empty list while prompts are still being read.

        Without ``isolate``, if the model or the sampler fails, all requests end, their blocks are freed and the error
        goes on; with it that happens only for what is no ``Exception`` (an interruption).
        """
        try:
            work = self.schedule.plan()
            if not work:
                return []
            self.counters.steps += 1
            try:
                rows = self.lm.forward([chunk for _, chunk in work])
            except Exception as error:
                return self._fail_pass(work, error)
            return self._results(work, rows)
        except BaseException:
            self.schedule.clear()
            raise

    @property
    def _room(self) -> int:
        """Tokens one sequence may have: the context, or all of the cache where that is smaller."""
        return min(self.lm.max_length, self.lm.num_blocks * self.lm.block_size)

    def _results(self, work: Work, rows: NDArray[np.float32]) -> list[Event]:
        events, first = [], 0
        for sequence, chunk in work:
            mine = rows[first : first + chunk.logits]
            first += chunk.logits
            if sequence not in self.schedule.running:  # another choice of its request has failed
                continue
            try:
                event = self._take(sequence, chunk, mine)
            except Exception as error:
                if not self.isolate:
                    raise
                if not np.isfinite(mine).all():  # what it computed before may be damaged, too
                    self.pool.forget(sequence.blocks)
                event = self._fail(sequence, error)
            if event is not None:
                events.append(event)
        return events

    def _take(self, sequence: RunningSequence, chunk: Chunk, rows: NDArray[np.float32]) -> Event | None:
        """What a pass means for one sequence: more of it cached, prompt scores, its next token."""
        sequence.cached = chunk.start + len(chunk.ids)
        self.counters.computed_tokens += len(chunk.ids)
        self.schedule.publish(sequence, chunk.start)
        sequence.score(rows, sequence.cached)
        return None if sequence.pending else self._advance(sequence, rows)

    def _advance(self, sequence: RunningSequence, rows: NDArray[np.float32]) -> Event:
        """Sample the next token of a sequence; a finished one leaves."""
        token, logprob = NO_TOKEN, None
        reason: FinishReason | None = None
        scores = sequence.scores or []
        first = len(sequence.ids) == sequence.prompt_length
        if sequence.params.max_new_tokens == 0:
            reason = "length"
        else:
            token, logprob = sequence.sampler.next(rows[-1], sequence.ids)
            sequence.ids.append(token)
            self.counters.generation_tokens += 1
            reason = sequence.ending(self._room)
        if reason is not None:
            self.schedule.release(sequence)
        return Event(
            sequence.key,
            sequence.choice,
            token,
            logprob,
            reason,
            ends_text=token in sequence.end_ids,
            cached_tokens=sequence.reused,
            prompt_logprobs=tuple(scores) if first else (),
        )

    def _fail(self, sequence: RunningSequence, error: Exception) -> Event:
        """End the request of a sequence."""
        self.cancel(sequence.key)
        return Event(sequence.key, sequence.choice, NO_TOKEN, error=error)

    def _fail_pass(self, work: Work, error: Exception) -> list[Event]:
        """A whole pass failed: every request in it ends, those that wait go on with an empty cache."""
        self.counters.failed_passes += 1
        if not self.isolate:
            raise error
        events: dict[int, Event] = {}
        for sequence, _ in work:
            events.setdefault(sequence.key, self._fail(sequence, error))
        self.pool.forget()
        return list(events.values())


def _check_named_ids(params: SamplingParams, vocab_size: int) -> None:
    """Ids in the parameters index a row of logits: one outside it would only be found while decoding."""
    named = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words_ids": [i for sequence in params.bad_words_ids for i in sequence],
    }
    for name, ids in named.items():
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise RequestError(f"{name}: token id {bad} is outside the vocabulary of {vocab_size} rows")
