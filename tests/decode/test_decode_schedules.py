"""Random schedules over small pools: plain random ones, and a state machine that hypothesis can shrink.

QWEN_TEST_SCHEDULES sets how many plain ones are played (each is a different seed).
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from research.qwen.decode.loop import Counters
from tests.decode.schedules import Play, random_ask, random_play

SCHEDULES = int(os.environ.get("QWEN_TEST_SCHEDULES", "60"))


@pytest.mark.slow
def test_whatever_the_schedule_everybody_gets_what_they_get_alone():
    total = Counters()
    failed = 0
    for seed in range(SCHEDULES):
        play = random_play(seed)
        try:
            loop = play.run()
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        for name, value in vars(loop.counters).items():
            setattr(total, name, getattr(total, name) + value)
        failed += len(play.failed)
    # The schedules are worth something only if all this happens in them.
    assert total.preemptions > SCHEDULES / 4
    assert total.prefix_hits > SCHEDULES
    assert total.failed_passes > SCHEDULES / 50
    assert failed > SCHEDULES / 10


class Schedule(RuleBasedStateMachine):
    """The same requests and checks, the order chosen by hypothesis."""

    @initialize(
        blocks=st.integers(6, 14),
        batch=st.integers(1, 4),
        chunk=st.integers(1, 9),
        mixed=st.one_of(st.none(), st.integers(1, 4)),
        cache=st.booleans(),
        prefixes=st.booleans(),
    )
    def start(self, blocks, batch, chunk, mixed, cache, prefixes):
        self.play = Play(
            [],
            blocks,
            max_batch=batch,
            prefill_chunk=chunk,
            mixed_chunk=mixed,
            use_cache=cache,
            prefix_caching=prefixes,
        )
        self.lent = []

    @rule(seed=st.integers(0, 400))
    def add(self, seed):
        self.play.add(random_ask(random.Random(seed), steps=1))

    @precondition(lambda self: self.play.open)
    @rule(data=st.data(), whole=st.booleans())
    def cancel(self, data, whole):
        key, choice = data.draw(st.sampled_from(sorted(self.play.open)))
        self.play.cancel(key, None if whole else choice)
        self.play.check()

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.play.turn()

    @rule()
    def forget(self):
        self.play.loop.pool.forget()

    @rule(count=st.integers(1, 6))
    def compute_beside(self, count):
        """Blocks for other work come from those admitted last, who lose nothing but time."""
        pool = self.play.loop.pool
        blocks = self.play.loop.take_blocks(min(count, pool.num_blocks))
        assert all(pool.users(block) == 1 and block not in pool._hash_of for block in blocks)
        for block in blocks:
            self.play.lm.cache[block * 4 : block * 4 + 4] = 7
        pool.free(blocks)
        self.play.check()

    def teardown(self):
        if hasattr(self, "play"):
            self.play.run()


TestSchedule = Schedule.TestCase
TestSchedule = pytest.mark.slow(TestSchedule)
TestSchedule.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
