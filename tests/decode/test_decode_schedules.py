"""The loop as a state machine: random requests, choices, cancellations and failing passes over small pools."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from tests.fakes import FakeLM


def events_alone(prompt, params, eos, max_length):
    """(token, finish reason) of every event of each choice, for a request that has a large cache to itself."""
    loop = GenerationLoop(FakeLM(num_blocks=200, max_length=max_length))
    loop.add(prompt, params, eos)
    events = {}
    while loop.busy:
        for event in loop.step():
            events.setdefault(event.choice, []).append((event.token, event.finish_reason))
    return events


class Schedule(RuleBasedStateMachine):
    """Whatever happens, live choices get the tokens of the request run alone, and blocks have one owner."""

    @initialize(
        blocks=st.integers(6, 14), batch=st.integers(1, 4), chunk=st.integers(1, 9), cache=st.booleans()
    )
    def start(self, blocks, batch, chunk, cache):
        self.lm = FakeLM(num_blocks=blocks, block_size=4, max_length=24)
        self.loop = GenerationLoop(self.lm, max_batch=batch, prefill_chunk=chunk, use_cache=cache)
        self.want, self.got = {}, {}

    @rule(
        prompt=st.lists(st.integers(0, 63), min_size=1, max_size=14),
        new=st.sampled_from([1, 3, 9, None]),
        seed=st.sampled_from([None, 1, 2**64 - 1]),
        n=st.integers(1, 3),
        penalty=st.sampled_from([1.0, 1.5]),
        eos=st.lists(st.integers(0, 63), max_size=4),
    )
    def add(self, prompt, new, seed, n, penalty, eos):
        params = SamplingParams(
            temperature=0.0 if seed is None else 1.5,
            seed=seed,
            n=n,
            max_new_tokens=new,
            repetition_penalty=penalty,
        )
        key = self.loop.add(prompt, params, eos)
        for choice, events in events_alone(prompt, params, eos, self.lm.max_length).items():
            self.want[key, choice], self.got[key, choice] = events, []

    @precondition(lambda self: self.want)
    @rule(data=st.data(), whole=st.booleans())
    def cancel(self, data, whole):
        key, choice = data.draw(st.sampled_from(sorted(self.want)))
        self.loop.cancel(key, None if whole else choice)
        for known in list(self.want):
            if known[0] == key and (whole or known[1] == choice):
                del self.want[known]

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.take(self.loop.step())

    def take(self, events):
        for event in events:
            place = event.key, event.choice
            self.got[place].append((event.token, event.finish_reason))
            assert self.got[place] == self.want[place][: len(self.got[place])]
            if event.finish_reason is not None:
                assert self.got[place] == self.want.pop(place)

    @precondition(lambda self: self.loop.busy)
    @rule()
    def failing_pass(self):
        self.lm.fail_at = 0
        with pytest.raises(RuntimeError, match="broken"):
            self.loop.step()
        self.lm.fail_at = None
        assert not self.loop.busy
        self.want.clear()

    @invariant()
    def blocks_have_one_owner(self):
        owned = [block for sequence in self.loop.schedule.running for block in sequence.blocks]
        assert len(owned) == len(set(owned))
        assert not set(owned) & set(self.loop.pool._free)
        assert len(owned) + self.loop.pool.free_blocks == self.lm.num_blocks

    @invariant()
    def first_come_first_served(self):
        order = [(s.key, s.choice) for s in (*self.loop.schedule.running, *self.loop.schedule.waiting)]
        assert order == sorted(order)

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        for _ in range(3000):
            if not self.loop.busy:
                break
            self.take(self.loop.step())
        assert not self.loop.busy, "starved"
        assert not self.want, "a request ended without its last token"
        assert sorted(self.loop.pool._free) == list(range(self.lm.num_blocks))


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
