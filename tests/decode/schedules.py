"""Random schedules of requests for the decoding loop, and what must hold at every step of them."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from tests.fakes import FakeLM

MAX_LENGTH = 24
BLOCK = 4
# Prompts with common beginnings of all lengths, and some of their own.
PROMPTS = [
    *[tuple(range(1, length + 1)) for length in (1, 3, 4, 5, 8, 9, 12, 16, 19, 23)],
    *[(*range(1, 9), *[40 + tail] * 5) for tail in range(3)],
    *[(50 + tail,) * 7 for tail in range(3)],
]


class Broken(Exception):
    """What a failing processor raises."""


@dataclass(frozen=True)
class Ask:
    """One request of a schedule: when it comes, when it is cancelled, after how many tokens its processor fails."""

    prompt: tuple[int, ...]
    params: SamplingParams
    eos: tuple[int, ...] = ()
    salt: str = ""
    arrives: int = 0
    cancelled: int | None = None
    one_choice: bool = False  # only choice 0 is cancelled
    fails: int | None = None

    def processors(self, choice):
        """The state of each choice is its own; the last choice is the one that fails."""
        return [Failing(self.fails)] if self.fails is not None and choice == self.params.n - 1 else []


class Failing:
    """Raises Broken at a row."""

    def __init__(self, after):
        self.left = after

    def __call__(self, ids, row):
        if not self.left:
            raise Broken
        self.left -= 1
        return row


@functools.cache
def alone(prompt, params, eos):
    """(token, reason, logprob, prompt logprobs) of every event of each choice, in a large cache without neighbours."""
    loop = GenerationLoop(FakeLM(num_blocks=200, block_size=BLOCK, max_length=MAX_LENGTH))
    loop.add(prompt, params, eos)
    events = {choice: [] for choice in range(params.n)}
    while loop.busy:
        for event in loop.step():
            events[event.choice].append(facts(event))
    return events


def facts(event):
    """What of an event does not depend on neighbours."""
    return event.token, event.finish_reason, event.logprob, event.prompt_logprobs


def random_params(rng):
    """Greedy or seeded, with all that changes what is computed."""
    seed = rng.choice([None, 1, 2])
    new = rng.choice([0, 1, 3, 6, 9, None])
    return SamplingParams(
        temperature=0.0 if seed is None else 1.5,
        seed=seed,
        n=rng.choice([1, 1, 1, 2, 3]),
        max_new_tokens=new,
        repetition_penalty=rng.choice([1.0, 1.5]),
        logprobs=rng.choice([None, 2]),
        prompt_logprobs=rng.choice([None, None, 1]),
    )


def random_ask(rng, steps=12):
    """A request somewhere in a schedule."""
    params = random_params(rng)
    prompts = PROMPTS if params.max_new_tokens == 0 else [p for p in PROMPTS if len(p) < MAX_LENGTH]
    return Ask(
        prompt=rng.choice(prompts),
        params=params,
        eos=rng.choice([(), (), tuple(range(0, 64, 5))]),
        salt=rng.choice(["", "", "", "salt"]),
        arrives=rng.randrange(steps),
        cancelled=rng.choice([None, None, None, rng.randrange(12)]),
        one_choice=rng.random() < 0.3,
        fails=rng.choice([None] * 6 + [rng.randrange(3)]),
    )


class Watched(FakeLM):
    """A model that looks, before a pass, whether any block to be written is shared or known."""

    def __init__(self, num_blocks, fail_passes=()):
        super().__init__(num_blocks, BLOCK, max_length=MAX_LENGTH)
        self.pool = None
        self.fail_passes, self.count = set(fail_passes), 0

    def forward(self, chunks):
        written = [
            block
            for chunk in chunks
            for block in chunk.blocks[chunk.start // BLOCK : -(-(chunk.start + len(chunk.ids)) // BLOCK)]
        ]
        for block in written:
            assert self.pool.users(block) == 1, "a block with two users is written"
            assert block not in self.pool._hash_of, "a known block is written"
        self.count += 1
        if self.count in self.fail_passes:
            for block in written:  # nothing that a failed pass has written is to be trusted
                self.cache[block * BLOCK : (block + 1) * BLOCK] = 7
            raise Broken
        return super().forward(chunks)


class Play:
    """One schedule played on one loop."""

    def __init__(self, asks, num_blocks, fail_passes=(), **options):
        self.lm = Watched(num_blocks, fail_passes)
        self.loop = GenerationLoop(self.lm, isolate=True, **options)
        self.lm.pool = self.loop.pool
        self.pending = sorted(asks, key=lambda ask: ask.arrives)
        self.asks, self.got, self.open = {}, {}, {}
        self.failed, self.step_number = set(), 0

    def run(self, limit=3000):
        """To the end, with all checks; the loop."""
        while self.pending or self.loop.busy:
            self.turn()
            assert self.step_number < limit, "starved"
        self.check_end()
        return self.loop

    def turn(self):
        """Arrivals and cancellations of this step, and the step."""
        while self.pending and self.pending[0].arrives <= self.step_number:
            self.add(self.pending.pop(0))
        for key, ask in self.asks.items():
            if ask.cancelled is not None and ask.arrives + ask.cancelled == self.step_number:
                self.cancel(key, 0 if ask.one_choice else None)
        events = self.loop.step()
        self.step_number += 1
        for event in events:
            self.take(event)
        self.check()

    def add(self, ask):
        """Queue a request."""
        key = self.loop.add(ask.prompt, ask.params, ask.eos, processors=ask.processors, cache_salt=ask.salt)
        self.asks[key] = ask
        for choice in range(ask.params.n):
            self.got[key, choice] = []
            self.open[key, choice] = True

    def cancel(self, key, choice):
        """End a request, or one choice."""
        self.loop.cancel(key, choice)
        for place in list(self.open):
            if place[0] == key and choice in (None, place[1]):
                del self.open[place]

    def take(self, event):
        """An event comes for an open choice and is the next of what it gets alone."""
        place, ask = (event.key, event.choice), self.asks[event.key]
        assert place in self.open, "an event after the end"
        if event.error is not None:
            assert isinstance(event.error, Broken)
            assert ask.fails is not None or self.lm.fail_passes, "somebody else's failure"
            self.failed.add(event.key)
            self.cancel(event.key, None)
            return
        self.got[place].append(facts(event))
        want = alone(ask.prompt, ask.params, ask.eos)[event.choice]
        assert self.got[place] == want[: len(self.got[place])]
        assert event.cached_tokens < len(ask.prompt)
        if event.finish_reason is not None:
            assert self.got[place] == want
            del self.open[place]

    def check(self):
        """Blocks have the users that hold them, and nobody overtakes."""
        schedule, pool = self.loop.schedule, self.loop.pool
        held = [block for sequence in schedule.running for block in sequence.blocks]
        for block in set(held):
            assert pool.users(block) == held.count(block)
        assert pool.free_blocks == pool.num_blocks - len(set(held))
        assert not any(sequence.blocks for sequence in schedule.waiting)
        order = [(s.key, s.choice) for s in (*schedule.running, *schedule.waiting)]
        assert order == sorted(order)
        assert set(order) == set(self.open)

    def check_end(self):
        """Nothing is left, and only those failed that had to."""
        assert not self.open, "a request ended without its last token"
        pool = self.loop.pool
        assert sorted([*pool._free, *pool._idle]) == list(range(pool.num_blocks))
        if not self.lm.fail_passes:
            assert all(self.asks[key].fails is not None for key in self.failed)


def random_play(seed):
    """A schedule, a pool and options drawn from a seed."""
    rng = random.Random(seed)
    caching = rng.random() < 0.8
    return Play(
        [random_ask(rng) for _ in range(rng.randint(1, 10))],
        num_blocks=rng.choice([6, 6, 7, 8, 9, 12, 30]),
        fail_passes=[rng.randrange(30)] if rng.random() < 0.15 else [],
        max_batch=rng.randint(1, 5),
        prefill_chunk=rng.choice([1, 3, 4, 9, 100]),
        mixed_chunk=rng.choice([None, 1, 2, 5]),
        use_cache=rng.random() < 0.9,
        prefix_caching=caching,
    )
