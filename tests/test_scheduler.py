"""The scheduler on a fake model: order of deltas, queue limits, cancellation, failures, other work, the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.errors import BusyError, ClosedError, PromptError, RequestError
from research.qwen.scheduler import FAILED_PASSES, Scheduler
from research.qwen.text.tokenizer import QwenTokenizer
from tests.fakes import FakeLM

WAIT = 20  # seconds after which something is taken for stuck
PARAMS = SamplingParams(temperature=1.5, seed=3, max_new_tokens=10, ignore_eos=True)
LONG = SamplingParams(temperature=1.5, seed=3, max_new_tokens=60, ignore_eos=True)


class GatedLM(FakeLM):
    """A pass waits until ``let`` permits it; ``entered`` tells that one has begun."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gated, self.broken = False, 0
        self.entered, self._permits = threading.Semaphore(0), threading.Semaphore(0)

    def forward(self, chunks):
        if self.gated:
            self.entered.release()
            assert self._permits.acquire(timeout=WAIT)
        if self.broken:
            self.broken -= 1
            raise RuntimeError("broken")
        return super().forward(chunks)

    def let(self, passes=1):
        """Permit passes."""
        self._permits.release(passes)

    def open_gate(self):
        """Permit all from now on."""
        self.gated = False
        self.let(1000)

    def wait_entered(self):
        """Until the next pass has begun."""
        assert self.entered.acquire(timeout=WAIT)


class Receiver(list):
    """What was delivered; ``wait`` for its end."""

    def __init__(self):
        super().__init__()
        self._ended = threading.Event()

    def __call__(self, item):
        self.append(item)
        if isinstance(item, BaseException) or item.usage is not None:
            self._ended.set()

    def wait(self):
        """All deltas, once the last one is here."""
        assert self._ended.wait(WAIT), "nothing ends"
        return list(self)

    def text(self, index=0):
        """The text of one choice."""
        return "".join(delta.text for delta in self.wait() if delta.index == index)


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer(demo_folder() / "qwen.tiktoken")


def make_engine(tokenizer, **options):
    sizes = {"num_blocks": 64, "max_length": 128, **options}
    lm = GatedLM(vocab_size=len(tokenizer), **sizes)
    return Engine(lm, tokenizer, generation={"chat_format": "chatml"})


@pytest.fixture
def scheduler(tokenizer):
    scheduler = Scheduler(make_engine(tokenizer))
    scheduler.start()
    assert scheduler.wait_ready(WAIT) and scheduler.state == "ready"
    yield scheduler
    scheduler.engine.lm.open_gate()
    scheduler.close()


def held(scheduler, prompt=(1, 2, 3), params=LONG):
    """A running request whose first pass has begun and waits; its ticket and receiver."""
    scheduler.engine.lm.gated = True
    receiver = Receiver()
    ticket = scheduler.submit(list(prompt), params, receiver)
    scheduler.engine.lm.wait_entered()
    return ticket, receiver


def test_everybody_gets_what_generate_gives(scheduler, tokenizer):
    params = SamplingParams(
        temperature=1.5, seed=3, n=2, max_new_tokens=10, ignore_eos=True, logprobs=1, prompt_logprobs=0
    )
    prompts = [[i, *range(20)] for i in range(6)]
    receivers = [Receiver() for _ in prompts]
    for prompt, receiver in zip(prompts, receivers, strict=True):
        scheduler.submit(prompt, params, receiver)
    for prompt, receiver in zip(prompts, receivers, strict=True):
        want = make_engine(tokenizer).generate([prompt], params)[0]
        deltas = receiver.wait()
        for index, choice in enumerate(want.choices):
            mine = [delta for delta in deltas if delta.index == index]
            assert "".join(delta.text for delta in mine) == choice.text
            assert [i for delta in mine for i in delta.ids] == choice.ids
            assert [entry for delta in mine for entry in delta.logprobs] == choice.logprobs
            assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
        assert list(next(d for d in deltas if d.index == 0).prompt_logprobs) == want.prompt_logprobs
        assert [delta.usage for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].usage.completion_tokens == 20


def test_times_come_in_their_order_and_are_final_at_the_end(scheduler):
    seen = []

    def deliver(item):
        if item.usage:
            seen.append((ticket.done, ticket.cached_tokens, ticket.ended_at is not None))

    scheduler.engine.lm.gated = True  # the ticket is known before the first delta comes
    ticket = scheduler.submit([1, 2, 3], PARAMS, deliver)
    assert not ticket.done and ticket.ended_at is None
    scheduler.engine.lm.open_gate()
    assert scheduler.drain(WAIT)
    assert seen == [(True, 0, True)]
    times = [ticket.queued_at, ticket.scheduled_at, ticket.first_token_at, ticket.ended_at]
    assert times == sorted(times)


def test_submitting_does_not_wait_for_the_model(scheduler):
    _, first = held(scheduler)
    others = [Receiver() for _ in range(3)]
    tickets = [scheduler.submit([5, i], PARAMS, receiver) for i, receiver in enumerate(others)]
    stats = scheduler.stats()
    assert (stats.running, stats.waiting) == (1, 3), "the first one runs from its first pass on"
    assert all(ticket.scheduled_at is None for ticket in tickets)
    scheduler.engine.lm.open_gate()
    assert [len(receiver.wait()) for receiver in others] == [10] * 3 and len(first.wait()) == 60


def test_a_full_queue_is_busy_until_it_is_not(tokenizer):
    engine = make_engine(tokenizer)
    scheduler = Scheduler(engine, max_queue=2)
    receivers = [Receiver(), Receiver()]
    for receiver in receivers:  # not started yet: they wait
        scheduler.submit([1, 2], PARAMS, receiver)
    with pytest.raises(BusyError, match="2 requests are waiting"):
        scheduler.submit([1, 2], PARAMS, Receiver())
    scheduler.start()
    assert [len(receiver.wait()) for receiver in receivers] == [10, 10]
    last = Receiver()
    scheduler.submit([1, 2], PARAMS, last)
    assert len(last.wait()) == 10
    scheduler.close()


def test_bad_requests_are_refused_at_once(scheduler):
    for ids, what in (([], "empty"), ([10**6], "outside"), ([1] * 128, "context holds 128")):
        with pytest.raises(PromptError, match=what):
            scheduler.submit(ids, PARAMS, Receiver())
    with pytest.raises(RequestError, match="max_queue"):
        Scheduler(scheduler.engine, max_queue=0)
    with pytest.raises(RequestError, match="mixed_chunk"):
        Scheduler(scheduler.engine, mixed_chunk=0)
    assert scheduler.stats().requests == 0


def test_a_cancelled_request_is_gone_before_the_next_pass(scheduler, tokenizer):
    lm = scheduler.engine.lm
    victim, lost = held(scheduler, prompt=[9] * 20)
    other = Receiver()
    scheduler.submit([1, 2], PARAMS, other)
    lm.let()  # the first pass; in the second both take part
    lm.wait_entered()
    assert len(lost) == 1 and len(lm.passes[-1]) == 1
    victim.cancel()
    victim.cancel()
    lm.let()
    lm.wait_entered()  # the third pass has begun
    assert victim.done and len(lost) == 1, "nothing is delivered after cancel"
    assert scheduler.stats().blocks_used == 1, "only the other's"
    assert scheduler.stats().finished == {"cancelled": 1}
    lm.open_gate()
    assert other.text() == make_engine(tokenizer).generate([[1, 2]], PARAMS)[0].text
    assert all(len(chunks) == 1 for chunks in lm.passes[-8:])


def test_a_request_cancelled_in_the_queue_never_runs(scheduler):
    _, first = held(scheduler)
    lost = Receiver()
    ticket = scheduler.submit([1, 2], PARAMS, lost)
    ticket.cancel()
    scheduler.engine.lm.open_gate()
    assert len(first.wait()) == 60 and scheduler.drain(WAIT)
    assert ticket.done and lost == [] and ticket.scheduled_at is None


def test_who_cannot_receive_is_cancelled(scheduler):
    def broken(item):
        raise RuntimeError("the event loop is closed")

    ticket = scheduler.submit([1, 2], LONG, broken)
    other = Receiver()
    scheduler.submit([1, 2], PARAMS, other)
    assert len(other.wait()) == 10 and scheduler.drain(WAIT)
    assert ticket.done and scheduler.stats().finished["cancelled"] == 1
    assert scheduler.stats().blocks_used == 0


def test_a_failing_processor_is_delivered_once(scheduler):
    def fail(ids, row):
        raise ZeroDivisionError

    bad, worse, good = Receiver(), Receiver(), Receiver()
    scheduler.submit([1, 2], SamplingParams(n=3), bad, processors=lambda c: [fail] if c else [])
    scheduler.submit([1, 2], PARAMS, worse, processors=lambda c: 1 / 0)
    scheduler.submit([1, 2], PARAMS, good)
    assert isinstance(bad.wait()[-1], ZeroDivisionError) and isinstance(worse.wait()[0], ZeroDivisionError)
    assert len(good.wait()) == 10 and scheduler.state == "ready"
    assert scheduler.drain(WAIT)
    assert sum(isinstance(item, BaseException) for item in (*bad, *worse)) == 2
    assert scheduler.stats().finished == {"error": 2, "length": 1}


def test_stop_strings_end_a_choice(scheduler, tokenizer):
    text = make_engine(tokenizer).generate([[1, 2]], LONG)[0].text
    stop = text[10:13]
    params = SamplingParams(temperature=1.5, seed=3, max_new_tokens=60, ignore_eos=True, stop=[stop])
    receiver = Receiver()
    scheduler.submit([1, 2], params, receiver)
    assert receiver.text() == text[: text.index(stop)] and receiver[-1].finish_reason == "stop"
    assert scheduler.drain(WAIT) and scheduler.stats().blocks_used == 0


def test_cached_tokens_are_in_usage_ticket_and_stats(scheduler):
    prompt = [4] * 21
    for cached in (0, 20):
        receiver = Receiver()
        ticket = scheduler.submit(prompt, PARAMS, receiver)
        assert receiver.wait()[-1].usage.cached_tokens == ticket.cached_tokens == cached
    other = Receiver()
    scheduler.submit(prompt, PARAMS, other, cache_salt="someone else")
    assert other.wait()[-1].usage.cached_tokens == 0
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.prefix_queries, stats.prefix_hits) == (63, 63, 20)
    assert stats.generation_tokens == 30 and stats.steps >= 30 and stats.step_seconds > 0
    assert stats.finished == {"length": 3} and stats.requests == 3


def test_other_work_runs_on_the_model_thread(scheduler):
    assert scheduler.call(lambda engine: threading.current_thread().name).result(WAIT) == "qwen-model"
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda engine: 1 / 0).result(WAIT)
    got = scheduler.call(lambda engine: engine.embed([[1, 2]])).result(WAIT)
    assert (scheduler.call(lambda engine: engine.embed_steps([[1, 2]])).result(WAIT) == got).all()
    assert scheduler.state == "ready"


def test_long_work_comes_in_turns_with_the_running(scheduler):
    order = []

    def work(engine):
        for piece in range(3):
            order.append(piece)
            yield
        return "done"

    ticket, _ = held(scheduler, params=PARAMS)
    ticket.deliver = lambda delta: order.append("token")
    future = scheduler.call(work)
    scheduler.engine.lm.open_gate()
    assert future.result(WAIT) == "done"
    assert order[:6] == ["token", "token", 0, "token", 1, "token"]


def test_work_that_generates_serves_the_others_too(scheduler, tokenizer):
    ticket, receiver = held(scheduler, params=PARAMS)
    other = Receiver()
    late = scheduler.submit([1, 2], PARAMS, other)
    future = scheduler.call(lambda engine: engine.generate([[5, 6]], PARAMS)[0].text)
    scheduler.engine.lm.open_gate()
    assert future.result(WAIT) == make_engine(tokenizer).generate([[5, 6]], PARAMS)[0].text
    assert len(receiver.wait()) == len(other.wait()) == 10
    assert ticket.scheduled_at <= late.scheduled_at <= late.first_token_at


def test_cancelled_work_never_runs(scheduler):
    _, receiver = held(scheduler)
    ran = []
    future = scheduler.call(lambda engine: ran.append(1))
    assert future.cancel()
    scheduler.engine.lm.open_gate()
    receiver.wait()
    with pytest.raises(CancelledError):
        future.result(WAIT)
    assert scheduler.drain(WAIT) and ran == []


def test_one_failed_pass_is_survived_a_broken_model_is_not(scheduler):
    lm = scheduler.engine.lm
    lm.broken = 1
    failed = Receiver()
    scheduler.submit([1, 2], PARAMS, failed)
    assert isinstance(failed.wait()[0], RuntimeError)
    fine = Receiver()
    scheduler.submit([1, 2], PARAMS, fine)
    assert len(fine.wait()) == 10 and scheduler.state == "ready"
    lm.broken = 10**6
    for _ in range(FAILED_PASSES):
        failed = Receiver()
        scheduler.submit([1, 2], PARAMS, failed)
        assert isinstance(failed.wait()[0], RuntimeError)
    scheduler._thread.join(WAIT)
    assert scheduler.state == "failed"
    with pytest.raises(ClosedError, match="the model has failed"):
        scheduler.submit([1, 2], PARAMS, Receiver())


def test_a_model_that_fails_while_warming_up(tokenizer):
    engine = make_engine(tokenizer)
    engine.lm.broken = 1
    scheduler = Scheduler(engine)
    early = Receiver()
    scheduler.submit([1, 2], PARAMS, early)
    scheduler.start()
    assert not scheduler.wait_ready(WAIT) and scheduler.state == "failed"
    assert isinstance(early.wait()[0], ClosedError)
    scheduler.close()


def test_warming_up_leaves_no_trace(scheduler):
    stats = scheduler.stats()
    assert (
        stats.requests == stats.steps == stats.prompt_tokens == stats.blocks_used == stats.blocks_known == 0
    )
    assert scheduler.engine.lm.passes


def test_draining_lets_the_running_finish(scheduler):
    _, receiver = held(scheduler)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(scheduler.drain(WAIT)))
    thread.start()
    while scheduler.state != "draining":
        assert thread.is_alive()
    with pytest.raises(ClosedError, match="shutting down"):
        scheduler.submit([1, 2], PARAMS, Receiver())
    with pytest.raises(ClosedError):
        scheduler.call(lambda engine: None)
    scheduler.engine.lm.open_gate()
    thread.join(WAIT)
    assert answers == [True] and len(receiver.wait()) == 60
    scheduler.close()
    assert scheduler.state == "closed"


def open_gate_once_stopping(scheduler):
    """A pass that has begun goes to its end; the next one must not begin."""
    while scheduler._stopping is None:
        time.sleep(0.001)
    scheduler.engine.lm.open_gate()


def test_after_the_grace_the_rest_is_told(scheduler):
    _, running = held(scheduler)
    waiting = Receiver()
    scheduler.submit([1, 2], PARAMS, waiting)
    future = scheduler.call(lambda engine: None)
    threading.Thread(target=open_gate_once_stopping, args=(scheduler,)).start()
    assert scheduler.drain(0) is False and scheduler.state == "closed"
    assert isinstance(running.wait()[-1], ClosedError) and isinstance(waiting.wait()[-1], ClosedError)
    assert len(waiting) == 1 and len(running) <= 2
    with pytest.raises(ClosedError):
        future.result(WAIT)
    assert scheduler.stats().blocks_used == 0 and len(scheduler.engine.requests) == 0


def test_closing_without_starting(tokenizer):
    scheduler = Scheduler(make_engine(tokenizer))
    receiver = Receiver()
    scheduler.submit([1, 2], PARAMS, receiver)
    scheduler.close()
    scheduler.close()
    assert isinstance(receiver.wait()[0], ClosedError) and scheduler.state == "closed"
