"""Requests of many threads on one engine: a bounded queue in front of the one thread that runs the model.

Whoever serves people (a web server, say) submits prompts from any thread and gets the deltas by a callback on the
model thread. Neither MindSpore nor asyncio in here. While a scheduler runs, other work on its engine goes through
``call``; the engine's own methods still work, but would wait for a turn between two steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from research.qwen.answers import Sink, Stats, Ticket
from research.qwen.decode.loop import Processors
from research.qwen.decode.pace import STRETCH, Pace
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.errors import BusyError, ClosedError, RequestError
from research.qwen.messages import Delta

T = TypeVar("T")
State = Literal["loading", "ready", "draining", "closed", "failed"]

FAILED_PASSES = 3  # one after the other: the model is broken, not a request
WARM_TOKENS = 4

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """Work for the model thread; as a generator it is run one piece between two steps."""

    work: Callable[[Engine], Any]
    future: Future[Any] = field(default_factory=Future)
    steps: Generator[None, None, Any] | None = None
    begun: bool = False

    def begin(self) -> bool:
        """False if the caller has cancelled it."""
        self.begun = self.future.set_running_or_notify_cancel()
        return self.begun

    def end(self, reason: BaseException) -> None:
        """It will not be finished."""
        if self.steps is not None:
            self.steps.close()
        if self.begun or self.begin():
            self.future.set_exception(reason)


@dataclass(frozen=True)
class _Order:
    """A request on its way to the model thread."""

    ticket: Ticket
    prompt_ids: list[int]
    params: SamplingParams
    options: Mapping[str, Any]  # of ``Requests.open``


class Scheduler:
    """See the module.

    Args:
        max_queue: requests that may wait while others run; one more gets BusyError.
        mixed_chunk: prompt tokens read in a step while other requests decode (see ``GenerationLoop``); None measures
            the steps and keeps those within ``stretch`` times a step that only decodes (``decode.pace``).
        warm_embeddings: run ``Engine.embed`` once before being ready: it may compile a graph of its own.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 256,
        mixed_chunk: int | None = None,
        stretch: float = STRETCH,
        warm_embeddings: bool = True,
    ):
        if max_queue < 1:
            raise RequestError(f"max_queue must be at least 1, got {max_queue}")
        if mixed_chunk is not None and mixed_chunk < 1:
            raise RequestError(f"mixed_chunk must be at least 1, got {mixed_chunk}")
        self.engine, self.max_queue, self.warm_embeddings = engine, max_queue, warm_embeddings
        self._requests, self._loop = engine.requests, engine.requests.loop
        self._pace = Pace(stretch) if mixed_chunk is None else None
        self._loop.limit_mixed(Pace(stretch).budget if mixed_chunk is None else mixed_chunk)
        self._state: State = "loading"
        self._failure: BaseException | None = None
        self._wake = threading.Condition()  # guards everything below
        self._orders: deque[_Order] = deque()
        self._cancels: deque[Ticket] = deque()
        self._calls: deque[_Call] = deque()
        self._tickets: dict[int, Ticket] = {}  # not yet done, by id
        self._last_id = 0
        self._stopping: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._finished: Counter[str] = Counter()
        self._seconds = 0.0
        self._base = replace(self._loop.counters)
        self._base_evictions = 0
        self._failures = 0  # passes, since the last one that worked

    # ---- any thread ----

    @property
    def state(self) -> State:
        """loading (not warm yet), ready, draining, closed, or failed (its model is broken)."""
        return self._state

    def start(self) -> None:
        """Start the model thread, which warms up before it is ready. Returns at once."""
        with self._wake:
            if self._thread is None and self._state == "loading":
                self._thread = threading.Thread(target=self._run, name="qwen-model", daemon=True)
                self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the scheduler is warm; False if it is not after ``timeout`` seconds, or has failed."""
        with self._wake:
            self._wake.wait_for(lambda: self._state != "loading", timeout)
            return self._state == "ready"

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        deliver: Sink,
        *,
        processors: Processors = (),
        cache_salt: str = "",
        adapter: str = "",
    ) -> Ticket:
        """Queue a request. Returns at once.

        Args:
            deliver: called on the model thread with the deltas of all choices in their order, the last of them with
                usage; or in place of what is missing with one exception. It must return quickly; if it raises, the
                request is cancelled.
            processors: logits processors; or a function that makes those of a choice from its number.
            cache_salt: only requests with the same one share cached prompts.
            adapter: name of the low-rank adapter to answer with.
        Raises:
            PromptError, RequestError: the request can never be served.
            BusyError: ``max_queue`` requests wait already.
            ClosedError: the scheduler is draining, closed or failed.
        """
        ids = self._requests.check(prompt_ids, params, adapter)
        options = {"processors": processors, "cache_salt": cache_salt, "adapter": adapter}
        with self._wake:
            self._check_open()
            if self._waiting() >= self.max_queue:
                raise BusyError(f"{self.max_queue} requests are waiting already; try again a little later")
            self._last_id += 1
            ticket = Ticket(self._last_id, deliver, self._cancel)
            self._tickets[ticket.id] = ticket
            self._orders.append(_Order(ticket, ids, params, options))
            self._wake.notify_all()
        return ticket

    def call(self, work: Callable[[Engine], T]) -> Future[T]:
        """Run ``work`` with the engine on the model thread, between two steps.

        If it returns a generator, that is advanced once between two steps (``Engine.embed_steps``), and its return
        value is the result; so long work does not hold up those who decode. Raises ClosedError as ``submit``.
        """
        call = _Call(work)
        with self._wake:
            self._check_open()
            self._calls.append(call)
            self._wake.notify_all()
        return call.future

    def drain(self, grace: float) -> bool:
        """Take no new requests and wait up to ``grace`` seconds for those at hand; the rest gets ClosedError.

        True if all of them ended by themselves.
        """
        with self._wake:
            if self._state in ("loading", "ready"):
                self._state = "draining"
            self._wake.notify_all()
            ended = self._wake.wait_for(lambda: not self._tickets and not self._calls, grace)
        if not ended:
            self._stop(ClosedError("the server is shutting down and the time to finish is over"))
        return ended

    def close(self) -> None:
        """End everything: what is left gets ClosedError, and the model thread ends."""
        self._stop(ClosedError("the scheduler is closed"))

    def stats(self) -> Stats:
        """Figures of this moment."""
        with self._wake:
            waiting = self._waiting()
            running = len(self._tickets) - waiting
            finished, requests = dict(self._finished), self._last_id
        pool = self._loop.pool
        return Stats(
            running=running,
            waiting=waiting,
            blocks_used=pool.num_blocks - pool.free_blocks,
            blocks_total=pool.num_blocks,
            blocks_known=pool.known_blocks,
            requests=requests,
            finished=finished,
            evictions=pool.evictions - self._base_evictions,
            step_seconds=self._seconds,
            **vars(self._loop.counters.since(self._base)),
        )

    def _check_open(self) -> None:
        if self._state == "failed":
            raise ClosedError(f"the model has failed and must be loaded again: {self._failure}")
        if self._state not in ("loading", "ready") or self._stopping is not None:
            raise ClosedError("the server is shutting down and takes no new requests")

    def _waiting(self) -> int:
        return sum(ticket.scheduled_at is None for ticket in self._tickets.values())

    def _cancel(self, ticket: Ticket) -> None:
        with self._wake:
            if not ticket.cancelled and not ticket.done:
                ticket.cancelled = True
                self._cancels.append(ticket)
                self._wake.notify_all()

    def _stop(self, reason: BaseException) -> None:
        with self._wake:
            if self._stopping is None:
                self._stopping = reason
            self._wake.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        elif thread is None:
            self._end(reason, "closed")

    # ---- the model thread ----

    def _run(self) -> None:
        try:
            self._warm()
            while self._stopping is None:
                self._turn()
            self._end(self._stopping, "closed")
        except BaseException as error:
            log.exception("the model thread has failed")
            self._failure = error
            self._end(ClosedError(f"the model has failed: {error}"), "failed")

    def _warm(self) -> None:
        """A few tokens, so that nothing is compiled or paged in when the first request comes."""
        room = self.engine.lm.max_length - WARM_TOKENS
        prompt = [0] * max(1, min(2 * self.engine.lm.block_size, room))
        self.engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True))
        if self.warm_embeddings:
            self.engine.embed([prompt])
        self.engine.forget_prefixes()
        self._base = replace(self._loop.counters)
        self._base_evictions = self._loop.pool.evictions
        with self._wake:
            if self._state == "loading":
                self._state = "ready"
            self._wake.notify_all()

    def _turn(self) -> None:
        """What has come in, one piece of other work, one step."""
        with self._wake:
            self._wake.wait_for(self._has_work)
            cancels, self._cancels = self._cancels, deque()
            orders, self._orders = self._orders, deque()
            calls = list(self._calls)
        for ticket in cancels:
            self._drop(ticket)
        for order in orders:
            self._open(order)
        if calls:
            self._advance(calls[0])
        if self._loop.busy and self._stopping is None:
            self._step()

    def _has_work(self) -> bool:
        work = self._orders or self._cancels or self._calls or self._loop.busy
        return bool(work) or self._stopping is not None

    def _open(self, order: _Order) -> None:
        ticket = order.ticket
        if ticket.done:
            return
        try:
            ticket.request = self._requests.open(
                order.prompt_ids,
                order.params,
                lambda item: self._hand_over(ticket, item),
                **order.options,
            )
        except Exception as error:
            self._hand_over(ticket, error)

    def _step(self) -> None:
        begin, failed = time.monotonic(), self._loop.counters.failed_passes
        self._requests.pump()
        seconds = time.monotonic() - begin
        self._seconds += seconds
        if self._pace is not None:
            self._loop.limit_mixed(self._pace.note(*self._loop.last_step, seconds))
        self._failures = self._failures + 1 if self._loop.counters.failed_passes > failed else 0
        if self._failures >= FAILED_PASSES:
            raise RuntimeError(f"{FAILED_PASSES} passes failed one after the other")

    def _advance(self, call: _Call) -> None:
        """One piece of the oldest other work."""
        if not call.begun and not call.begin():
            self._forget_call(call)
            return
        try:
            if call.steps is not None:
                next(call.steps)
                return
            result = call.work(self.engine)
            if isinstance(result, Generator):
                call.steps = result
                return
        except StopIteration as end:
            result = end.value
        except Exception as error:
            self._forget_call(call)
            call.future.set_exception(error)
            return
        self._forget_call(call)
        call.future.set_result(result)

    def _forget_call(self, call: _Call) -> None:
        with self._wake:
            self._calls.remove(call)
            self._wake.notify_all()

    def _hand_over(self, ticket: Ticket, item: Delta | BaseException) -> None:
        """Deliver one item, unless the request was cancelled meanwhile."""
        if ticket.done or ticket.cancelled:
            return
        now = time.monotonic()
        if isinstance(item, Delta):
            if ticket.first_token_at is None and item.ids:
                ticket.first_token_at = now
            if item.finish_reason is not None:
                self._finished[item.finish_reason] += 1
            if item.usage is not None:
                ticket.cached_tokens = item.usage.cached_tokens
                self._finish(ticket)
        else:
            self._finished["error"] += 1
            self._finish(ticket)
        try:
            ticket.deliver(item)
        except Exception:
            log.exception("request %d: its receiver has failed", ticket.id)
            self._cancel(ticket)

    def _finish(self, ticket: Ticket) -> None:
        with self._wake:
            ticket.ended_at = time.monotonic()
            self._tickets.pop(ticket.id, None)
            self._wake.notify_all()

    def _drop(self, ticket: Ticket) -> None:
        """Take a cancelled request out of the loop."""
        if ticket.done:
            return
        self._finished["cancelled"] += 1
        if ticket.request is not None:
            self._requests.close(ticket.request)
        self._finish(ticket)

    def _end(self, reason: BaseException, state: State) -> None:
        """Everybody who still waits hears why nothing more comes."""
        with self._wake:
            self._state = state
            tickets, calls = list(self._tickets.values()), list(self._calls)
            self._calls.clear()
            self._orders.clear()
            self._wake.notify_all()
        for ticket in tickets:
            if ticket.request is not None:
                self._requests.close(ticket.request)
            self._hand_over(ticket, reason)
            if not ticket.done:
                self._finish(ticket)
        for call in calls:
            call.end(reason)
