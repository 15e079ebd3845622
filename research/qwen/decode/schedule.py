"""Which sequences run, which wait, and what goes into the next pass. Policy and proof: see ``decode.loop``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research.qwen.decode.blocks import BlockPool
from research.qwen.decode.sequence import Chunk, RunningSequence
from research.qwen.errors import PromptError

SCORE_ROWS = 256  # logits of prompts that are held at once: 256 x 151936 float32 = 156 MB

Work = list[tuple[RunningSequence, Chunk]]


@dataclass
class Counters:
    """What a loop has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # of the requests that were started
    computed_tokens: int = 0  # that went through the model, those computed again included
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens that were looked up in the cache
    prefix_hits: int = 0  # and those found there
    failed_passes: int = 0

    def since(self, base: Counters) -> Counters:
        """What came after ``base``."""
        return Counters(**{name: value - getattr(base, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Limits:
    """How much runs at once: sequences, prompt tokens of a step, the same while others decode; and with what cache."""

    max_batch: int
    prefill_chunk: int
    mixed_chunk: int
    use_cache: bool
    prefix_caching: bool


class Schedule:
    """The queue, the running sequences in the order of admission, and their blocks."""

    def __init__(self, pool: BlockPool, block_size: int, limits: Limits):
        self.pool, self.block_size, self.limits = pool, block_size, limits
        self.counters = Counters()
        self.on_start: Callable[[int], None] | None = None  # hears the key of a request that begins to run
        self.decoded = self.read = 0  # single tokens, and tokens of prompts, in the last step
        self.waiting: deque[RunningSequence] = deque()
        self.running: list[RunningSequence] = []

    def remove(self, key: int, choice: int | None = None) -> None:
        """Take the sequences of a request, or one of them, out; their blocks are free at once."""
        for sequence in [s for s in self.running if s.key == key and choice in (None, s.choice)]:
            self.release(sequence)
        kept = (s for s in self.waiting if s.key != key or choice not in (None, s.choice))
        self.waiting = deque(kept)

    def clear(self) -> None:
        """Take everything out and forget what is cached."""
        for sequence in list(self.running):
            self.release(sequence)
        self.waiting.clear()
        self.pool.forget()

    def release(self, sequence: RunningSequence) -> None:
        """A running sequence runs no longer."""
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.cached = [], 0
        self.running.remove(sequence)

    def take_blocks(self, count: int) -> list[int]:
        """See ``GenerationLoop.take_blocks``."""
        while True:
            blocks = self.pool.alloc(count)
            if blocks is not None:
                return blocks
            if not self.running:
                raise PromptError(
                    f"{count} cache blocks are needed, {self.pool.free_blocks} of {self.pool.num_blocks} can be "
                    "had; give fewer tokens at once or raise num_blocks"
                )
            self._preempt()

    def plan(self) -> Work:
        """Admit who can be; then the chunks of the next step: every decoding sequence, and prompts as far as the
        budget goes."""
        self._admit()
        for sequence in list(self.running):
            self._grow(sequence)
        for sequence in self.running:
            self._catch_up(sequence)
        decoding = any(sequence.pending == 1 for sequence in self.running)
        budget = self.limits.mixed_chunk if decoding else self.limits.prefill_chunk
        self.decoded = self.read = 0
        work: Work = []
        rows = SCORE_ROWS
        for place, sequence in enumerate(self.running):
            count = self._share_of(sequence, budget, rows, self.running[:place])
            if not count:
                continue
            if count > 1 or sequence.pending > 1:
                budget -= count
                self.read += count
            else:
                self.decoded += 1
            wanted = sequence.rows_wanted(count)
            rows -= wanted if sequence.scoring else 0
            ids = sequence.ids[sequence.cached : sequence.cached + count]
            blocks, adapter = tuple(sequence.blocks), sequence.adapter
            work.append((sequence, Chunk(ids, sequence.cached, blocks, sequence.alpha, wanted, adapter)))
        return work

    def publish(self, sequence: RunningSequence, start: int) -> None:
        """Make the blocks known that were filled since ``start`` tokens were cached."""
        if self.limits.prefix_caching:
            size = self.block_size
            for place in range(start // size, sequence.cached // size):
                self.pool.publish(sequence.blocks[place], sequence.hashes(place + 1, size)[place])

    # ---- admission ----

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_batch:
            sequence = self.waiting[0]
            shared = self.pool.share(self._reusable(sequence))
            needed = self._blocks_for(sequence) - len(shared)
            # A spare block for each sequence already running: else the newcomer may be the next to be preempted.
            blocks = None
            if self.pool.free_blocks >= needed + len(self.running):
                blocks = self.pool.alloc(needed)
            if blocks is None:
                self.pool.free(shared)
                return
            sequence.blocks = shared + blocks
            sequence.cached = len(shared) * self.block_size
            self.running.append(self.waiting.popleft())
            self._count(sequence)

    def _count(self, sequence: RunningSequence) -> None:
        if sequence.started:
            return
        sequence.started = True
        sequence.reused = sequence.cached
        self.counters.prefix_hits += sequence.cached
        if self.limits.prefix_caching:
            self.counters.prefix_queries += sequence.prompt_length
        if sequence.choice == 0:
            self.counters.prompt_tokens += sequence.prompt_length
            if self.on_start is not None:
                self.on_start(sequence.key)

    def _reusable(self, sequence: RunningSequence) -> list[bytes]:
        """Hashes of the blocks a sequence may take from the cache: the last id at least is computed."""
        if not self.limits.prefix_caching or sequence.scoring:
            return []
        return sequence.hashes((len(sequence.ids) - 1) // self.block_size, self.block_size)

    # ---- blocks of those that run ----

    def _blocks_for(self, sequence: RunningSequence) -> int:
        return -(-len(sequence.ids) // self.block_size)

    def _grow(self, sequence: RunningSequence) -> None:
        """Give a sequence the blocks its ids need, from those admitted last if there are no others."""
        while sequence in self.running:
            missing = self._blocks_for(sequence) - len(sequence.blocks)
            blocks = self.pool.alloc(max(missing, 0))
            if blocks is not None:
                sequence.blocks += blocks
                return
            self._preempt()

    def _preempt(self) -> None:
        victim = self.running[-1]
        self.release(victim)
        victim.preempted = True
        self.waiting.appendleft(victim)
        self.counters.preemptions += 1

    # ---- sharing ----

    def _catch_up(self, sequence: RunningSequence) -> None:
        """In place of its next blocks, not yet written, take those that another sequence has computed meanwhile."""
        first, rest = divmod(sequence.cached, self.block_size)
        if sequence.pending == 1 or rest:
            return
        known = self.pool.share(self._reusable(sequence)[first:])
        self.pool.free(sequence.blocks[first : first + len(known)])
        sequence.blocks[first : first + len(known)] = known
        sequence.cached += len(known) * self.block_size
        if not sequence.preempted:
            sequence.reused += len(known) * self.block_size
            self.counters.prefix_hits += len(known) * self.block_size

    def _share_of(
        self, sequence: RunningSequence, budget: int, rows: int, older: Sequence[RunningSequence]
    ) -> int:
        """How many tokens of a sequence the next step computes."""
        if not self.limits.use_cache:
            sequence.cached = 0
            return sequence.pending
        if sequence.pending == 1 and not sequence.scoring:
            return 1
        if self._comes_anyway(sequence, older):
            return 0
        return max(0, min(sequence.pending, budget, rows if sequence.scoring else budget))

    def _comes_anyway(self, sequence: RunningSequence, older: Sequence[RunningSequence]) -> bool:
        """Whether the next block of a sequence is one that an older sequence is about to compute.

        The oldest sequence that still reads never waits, so a chain of those who wait ends in one that gets on.
        """
        place, rest = divmod(sequence.cached, self.block_size)
        mine = self._reusable(sequence)
        if rest or place >= len(mine):
            return False
        end = (place + 1) * self.block_size
        return any(
            other.hashes(place + 1, self.block_size)[place] == mine[place]
            for other in older
            if other.pending > 1 and other.cached < end <= len(other.ids)
        )
