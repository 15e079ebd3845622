"""Many threads submit and cancel at random on a small cache: every text is the one computed alone, nothing leaks."""

from __future__ import annotations

import random
import threading

import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.errors import BusyError, ClosedError
from research.qwen.scheduler import Scheduler
from research.qwen.text.tokenizer import QwenTokenizer
from tests.fakes import FakeLM
from tests.test_scheduler import WAIT, Receiver

SYSTEM = list(range(30))


def make_engine(num_blocks):
    tokenizer = QwenTokenizer(demo_folder() / "qwen.tiktoken")
    lm = FakeLM(num_blocks=num_blocks, vocab_size=len(tokenizer), max_length=96)
    return Engine(lm, tokenizer, max_batch=6, prefill_chunk=16)


def random_request(rng):
    """Prompts and parameters from a small set, so that each is computed alone only once."""
    prompt = SYSTEM[: rng.choice([3, 16, 17, 30])] + [rng.randrange(40, 44)] * rng.choice([0, 1, 9])
    params = SamplingParams(
        temperature=rng.choice([0.0, 1.5]),
        seed=rng.choice([1, 2]),
        max_new_tokens=rng.choice([1, 7, 20]),
        n=rng.choice([1, 1, 2]),
        stop=rng.choice([(), ("a",)]),
    )
    return prompt, params


def texts(deltas, params):
    return ["".join(d.text for d in deltas if d.index == i) for i in range(params.n)]


class Client(threading.Thread):
    """Submits requests one after the other; every fifth is cancelled after some deltas."""

    def __init__(self, scheduler, seed, count):
        super().__init__()
        self.scheduler, self.rng, self.count = scheduler, random.Random(seed), count
        self.answers, self.busy, self.cancelled, self.wrong = [], 0, 0, []

    def run(self):
        for _ in range(self.count):
            prompt, params = random_request(self.rng)
            receiver = CancellingReceiver(self.rng.randrange(4) if self.rng.random() < 0.2 else None)
            try:
                receiver.ticket = self.scheduler.submit(prompt, params, receiver)
            except BusyError:
                self.busy += 1
                continue
            receiver.has_ticket.set()
            if not receiver.ended.wait(WAIT):
                self.wrong.append("a request does not end")
            elif receiver.was_cancelled:
                self.cancelled += 1
            else:
                self.answers.append((prompt, params, list(receiver)))


class CancellingReceiver(Receiver):
    """Cancels its request on the model thread once it has so many deltas."""

    def __init__(self, cancel_after):
        super().__init__()
        self.left, self.ticket, self.was_cancelled = cancel_after, None, False
        self.ended, self.has_ticket = threading.Event(), threading.Event()

    def __call__(self, item):
        assert not self.was_cancelled, "a delta after cancel"
        super().__call__(item)
        if self.left == 0:
            assert self.has_ticket.wait(WAIT)
            self.was_cancelled = True
            self.ticket.cancel()
        self.left = None if self.left is None else self.left - 1
        if self.was_cancelled or isinstance(item, BaseException) or item.usage is not None:
            self.ended.set()


@pytest.mark.slow
def test_many_clients():
    scheduler = Scheduler(make_engine(num_blocks=40), max_queue=5, mixed_chunk=4)
    scheduler.start()
    clients = [Client(scheduler, seed, count=20) for seed in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(WAIT)
    assert scheduler.drain(WAIT)
    stats = scheduler.stats()
    scheduler.close()
    assert not scheduler._thread.is_alive()
    assert [client.wrong for client in clients] == [[]] * 8
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert len(scheduler.engine.requests) == 0 and not scheduler._tickets
    assert stats.requests + sum(client.busy for client in clients) == 160
    assert stats.prefix_hits > 0 and sum(client.cancelled for client in clients) > 0
    check_answers([answer for client in clients for answer in client.answers])


def check_answers(answers):
    """Each text is what a large cache of its own gives."""
    assert len(answers) > 60
    engine, known = make_engine(num_blocks=400), {}
    for prompt, params, deltas in answers:
        key = (tuple(prompt), params)
        if key not in known:
            engine.forget_prefixes()
            known[key] = engine.generate([prompt], params)[0]
        assert texts(deltas, params) == [choice.text for choice in known[key].choices]
        assert deltas[-1].usage.completion_tokens == known[key].usage.completion_tokens


def test_closing_under_load_tells_everybody():
    scheduler = Scheduler(make_engine(num_blocks=40))
    scheduler.start()
    receivers = [Receiver() for _ in range(30)]
    for number, receiver in enumerate(receivers):
        scheduler.submit([number, 2, 3], SamplingParams(max_new_tokens=90, ignore_eos=True), receiver)
    scheduler.close()
    for receiver in receivers:
        last = receiver.wait()[-1]
        assert isinstance(last, ClosedError) or last.usage is not None
    assert scheduler.stats().blocks_used == 0 and scheduler.state == "closed"


def test_the_measured_pace_sets_what_is_read_beside_answers():
    scheduler = Scheduler(make_engine(num_blocks=40))
    noted = []

    class ThreeTokens:
        def note(self, decoding, reading, seconds):
            noted.append((decoding, reading, seconds > 0))
            return 3

    scheduler._pace = ThreeTokens()
    first, second = Receiver(), Receiver()
    scheduler.submit([1, 2, 3], SamplingParams(max_new_tokens=30, ignore_eos=True), first)
    scheduler.submit(SYSTEM, SamplingParams(max_new_tokens=1, ignore_eos=True), second)
    scheduler.start()
    first.wait()
    second.wait()
    scheduler.close()
    assert noted[:2] == [(0, 16, True), (1, 3, True)], "13 of the second beside the first prompt, then 3"
    assert scheduler._loop.schedule.limits.mixed_chunk == 3


def test_who_waits_for_a_model_that_breaks_hears_of_it():
    engine = make_engine(num_blocks=40)
    engine.lm.fail_at = 0
    scheduler = Scheduler(engine)
    ready = []
    waiting = threading.Thread(target=lambda: ready.append(scheduler.wait_ready(WAIT)))
    waiting.start()
    scheduler.start()
    scheduler._thread.join(WAIT)
    waiting.join(WAIT / 4)
    assert ready == [False] and scheduler.state == "failed" and scheduler.drain(WAIT)
