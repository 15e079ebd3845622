"""What a request gives back, and how its tokens become text while it runs. Pure Python; used by the engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.loop import NO_TOKEN, Event, GenerationLoop, Processors
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError
from research.qwen.messages import Delta, FinishReason, TokenLogprob, Usage
from research.qwen.text.detokenizer import Detokenizer
from research.qwen.text.stop import StopMatcher
from research.qwen.text.tokenizer import QwenTokenizer

Sink = Callable[[Delta | BaseException], None]


@dataclass(frozen=True)
class Choice:
    """One answer: new token ids (the ending control id included, where one came), their text, why it ended."""

    ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


def as_choice(deltas: Sequence[Delta], with_logprobs: bool) -> Choice:
    """The deltas of one choice put together."""
    return Choice(
        [i for delta in deltas for i in delta.ids],
        "".join(delta.text for delta in deltas),
        deltas[-1].finish_reason or "length",
        [entry for delta in deltas for entry in delta.logprobs] if with_logprobs else None,
    )


@dataclass(frozen=True)
class Result:
    """All answers to one prompt; ``ids``, ``text`` and ``finish_reason`` are those of the first."""

    prompt_ids: list[int]
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def ids(self) -> list[int]:
        """New token ids of the first answer."""
        return self.choices[0].ids

    @property
    def text(self) -> str:
        """Text of the first answer, without stop string and control tokens."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended: stop or length."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the first answer, if asked for."""
        return self.choices[0].logprobs


@dataclass(frozen=True)
class Score:
    """Log-probability of each scored token given all before it, and whether greedy decoding would have chosen it."""

    ids: list[int]
    logprobs: NDArray[np.float64]  # (len(ids),)
    greedy: NDArray[np.bool_]  # (len(ids),)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return float(self.logprobs.sum())


class Track:
    """One choice of one request while it runs: ids to whole characters to text without stop strings."""

    def __init__(self, tokenizer: QwenTokenizer | None, params: SamplingParams):
        self.detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer else None
        self.matcher = StopMatcher(params.stop)
        self.params = params
        self.tokens = 0
        self.done = False

    def add(self, event: Event) -> Delta:
        """The part of the event's text that can be shown; ``done`` is set when the choice has ended."""
        ids = () if event.token == NO_TOKEN else (event.token,)
        self.tokens += len(ids)
        text = self._text(event, ids) if self.detokenizer is not None else ""
        reason = "stop" if self.matcher.matched is not None else event.finish_reason
        self.done = reason is not None
        logprobs = (event.logprob,) if event.logprob is not None else ()
        return Delta(text, ids, event.choice, reason, logprobs, prompt_logprobs=event.prompt_logprobs)

    def _text(self, event: Event, ids: tuple[int, ...]) -> str:
        assert self.detokenizer is not None
        shown = self.params.include_stop_str_in_output or not event.ends_text
        piece = self.detokenizer.add(ids[0]) if ids and shown else ""
        if event.finish_reason is not None:
            piece += self.detokenizer.flush()
        if self.tokens < self.params.min_new_tokens:  # a stop string counts from here on
            return piece
        text = self.matcher.feed(piece)
        if self.matcher.matched is not None:
            return text + (self.matcher.matched if self.params.include_stop_str_in_output else "")
        return text + (self.matcher.flush() if event.finish_reason is not None else "")


class Request:
    """A running request: its tracks, its counts, and where its deltas go.

    Without ``sink`` they wait in ``inbox`` until somebody fetches them.
    """

    def __init__(
        self,
        key: int,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: QwenTokenizer | None,
        sink: Sink | None = None,
    ):
        self.key = key
        self.prompt_ids = prompt_ids
        self.tracks = [Track(tokenizer, params) for _ in range(params.n)]
        self.inbox: deque[Delta] = deque()
        self.sink = sink or self._keep
        self.new_tokens = 0
        self.cached_tokens = 0
        self.failure: BaseException | None = None
        self.started_at: float | None = None  # when its first pass began, of time.monotonic

    @property
    def running(self) -> bool:
        """Whether any choice is still to end."""
        return self.failure is None and not all(track.done for track in self.tracks)

    def take(self, event: Event) -> Delta:
        """The delta of an event; the last one of the request carries its usage."""
        track = self.tracks[event.choice]
        delta = track.add(event)
        self.new_tokens += len(delta.ids)
        if event.choice == 0:
            self.cached_tokens = event.cached_tokens
        if not self.running:
            delta = replace(delta, usage=self.usage)
        return delta

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(len(self.prompt_ids), self.new_tokens, self.cached_tokens)

    def fail(self, error: BaseException) -> None:
        """End the request: nothing follows the error."""
        self.failure = error
        self.sink(error)

    def _keep(self, item: Delta | BaseException) -> None:
        if isinstance(item, Delta):
            self.inbox.append(item)


class Requests:
    """The running requests of an engine and the loop that computes them. Whoever drives it holds ``lock``."""

    def __init__(self, loop: GenerationLoop, tokenizer: QwenTokenizer | None, eos_ids: Sequence[int]):
        self.loop, self.tokenizer, self.eos_ids = loop, tokenizer, tuple(eos_ids)
        self.lock = threading.RLock()
        self._requests: dict[int, Request] = {}
        loop.schedule.on_start = self._note_start

    def __len__(self) -> int:
        return len(self._requests)

    def open(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        sink: Sink | None = None,
        *,
        processors: Processors = (),
        cache_salt: str = "",
        adapter: str = "",
    ) -> Request:
        """Queue one request whose deltas, or error, go to ``sink`` from within ``pump``.

        Raises PromptError and RequestError, see ``GenerationLoop.check``.
        """
        with self.lock:
            key = self.loop.add(
                prompt_ids,
                params,
                self.eos_ids,
                processors=processors,
                cache_salt=cache_salt,
                adapter=adapter,
            )
            request = Request(key, prompt_ids, params, self.tokenizer, sink)
            self._requests[key] = request
        return request

    def close(self, request: Request) -> None:
        """Drop a request nobody waits for any more, and free its cache."""
        with self.lock:
            if self._requests.pop(request.key, None) is not None:
                self.loop.cancel(request.key)

    def pump(self) -> None:
        """One step of the shared loop; its events become deltas of their requests."""
        with self.lock:
            try:
                events = self.loop.step()
            except BaseException as error:
                failed = list(self._requests.values())
                self._requests.clear()
                for request in failed:
                    request.fail(error)
                raise
            for event in events:
                self._route(event)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str = "") -> list[int]:
        """The prompt as a list of int, if it can be served; from any thread. Raises as ``GenerationLoop.check``."""
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a vocabulary; use stop_token_ids")
        return self.loop.check(prompt_ids, params, adapter)

    def _note_start(self, key: int) -> None:
        request = self._requests.get(key)
        if request is not None:
            request.started_at = time.monotonic()

    def _route(self, event: Event) -> None:
        request = self._requests.get(event.key)
        if request is None or request.tracks[event.choice].done:
            return
        try:
            if event.error is not None:
                raise event.error
            delta = request.take(event)
        except Exception as error:
            self.close(request)
            request.fail(error)
            return
        if not request.running:
            self.close(request)
        elif delta.finish_reason is not None and event.finish_reason is None:
            self.loop.cancel(event.key, event.choice)  # a stop string: the loop does not know it yet
        request.sink(delta)


class Ticket:
    """A submitted request. Times are of ``time.monotonic``, None until it comes to that.

    They and ``cached_tokens`` are final when the last delta, or the exception, is delivered.
    """

    def __init__(self, number: int, deliver: Sink, cancel: Callable[[Ticket], None]):
        self.id = number
        self.queued_at: float = time.monotonic()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.cached_tokens = 0
        self.deliver = deliver
        self.request: Request | None = None  # once the model thread has it
        self.cancelled = False
        self._cancel = cancel

    @property
    def scheduled_at(self) -> float | None:
        """When its first pass began."""
        return self.request.started_at if self.request is not None else None

    @property
    def done(self) -> bool:
        """Whether nothing more will be delivered."""
        return self.ended_at is not None

    def cancel(self) -> None:
        """End the request: nothing more is delivered, its cache is free before the next step. From any thread."""
        self._cancel(self)


@dataclass(frozen=True)
class Stats:
    """What a scheduler does now, and totals since it was ready. Tokens found in the cache count as prompt tokens."""

    running: int  # requests at work
    waiting: int  # requests of which nothing was computed yet
    blocks_used: int
    blocks_total: int
    blocks_known: int  # that hold tokens another prompt may begin with
    requests: int
    finished: dict[str, int]  # choices by finish reason; requests that were cancelled or failed
    steps: int
    step_seconds: float
    prompt_tokens: int
    computed_tokens: int  # that went through the model, those computed again after a preemption included
    generation_tokens: int
    prefix_queries: int  # prompt tokens of all choices that were looked up in the cache
    prefix_hits: int
    preemptions: int
    evictions: int
    failed_passes: int
