"""From the model thread to the event loop: the deltas of the prompts of one HTTP request."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from research.qwen.decode.params import SamplingParams
from research.qwen.decode.processors import LogitsProcessor
from research.qwen.errors import BusyError
from research.qwen.messages import Delta, Usage
from research.qwen.serve.errors import ApiError
from research.qwen.serve.logs import note
from research.qwen.serve.protocol import SamplingFields
from research.qwen.serve.state import ServerState

MAX_SUBMITTED = 64  # prompts of one HTTP request at the scheduler at a time
RETRY_SECONDS = 0.02

log = logging.getLogger(__name__)


class Cancellable(Protocol):
    """What is needed of a scheduler's ticket."""

    def cancel(self) -> None:
        """End the request without further deltas."""


@dataclass(frozen=True)
class Ask:
    """One prompt for the scheduler; ``processors`` makes the logits processors of a choice."""

    prompt_ids: list[int]
    params: SamplingParams
    processors: Callable[[int], Sequence[LogitsProcessor]] | None = None
    cache_salt: str = ""
    adapter: str = ""


class Answers:
    """The prompts of one HTTP request while they run. Made and used on the event loop.

    Iterating yields (number of the prompt, delta) as they come. ``usage`` is the sum so far over all prompts that were
    submitted; ``reasons`` are those of the choices that ended. ``close`` cancels whatever still runs, so a client that
    left frees its blocks at once.
    """

    def __init__(self, state: ServerState, asks: Sequence[Ask]):
        """Submit the first prompts; the others follow as these end, so that a long list fits into a short queue.

        Raises what the scheduler raises for the first of them; then none runs.
        """
        self._state, self._left = state, deque(enumerate(asks))
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue()
        self._running: dict[int, Cancellable] = {}
        self._prompt_tokens = self._new_tokens = self._cached_tokens = 0
        self.reasons: Counter[str] = Counter()
        try:
            self._submit()
            self._fill()
        except BaseException:
            self.close()
            raise

    @property
    def usage(self) -> Usage:
        """Token counts so far; the cached ones are known when a prompt has ended."""
        return Usage(self._prompt_tokens, self._new_tokens, self._cached_tokens)

    def _submit(self) -> None:
        number, ask = self._left[0]
        options: dict[str, Any] = {"processors": ask.processors} if ask.processors is not None else {}
        if ask.adapter:
            options["adapter"] = ask.adapter
        deliver = self._deliver(number)
        ticket = self._state.submit(ask.prompt_ids, ask.params, deliver, cache_salt=ask.cache_salt, **options)
        self._left.popleft()
        self._running[number] = ticket
        self._prompt_tokens += len(ask.prompt_ids)

    def _fill(self) -> None:
        """Submit more, as many as the queue takes."""
        try:
            while self._left and len(self._running) < MAX_SUBMITTED:
                self._submit()
        except BusyError:
            log.debug("the queue is full: %d prompts of a list wait outside", len(self._left))

    def _deliver(self, number: int) -> Callable[[Delta | BaseException], None]:
        def deliver(item: Delta | BaseException) -> None:
            try:
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, (number, item))
            except RuntimeError:  # the event loop is closed: nobody waits any more
                ticket = self._running.get(number)
                if ticket is not None:
                    ticket.cancel()

        return deliver

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        while self._running or self._left:
            self._fill()
            if not self._running:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            number, item = await self._inbox.get()
            if isinstance(item, BaseException):
                self._running.pop(number, None)
                self.close()
                raise item
            self._count(number, item)
            yield number, item

    def _count(self, number: int, delta: Delta) -> None:
        self._new_tokens += len(delta.ids)
        if delta.finish_reason is not None:
            self.reasons[delta.finish_reason] += 1
        if delta.usage is not None:
            self._running.pop(number, None)
            self._cached_tokens += delta.usage.cached_tokens

    def close(self) -> None:
        """Cancel what still runs."""
        self._left.clear()
        for ticket in self._running.values():
            ticket.cancel()
        self._running.clear()

    def end(self, request: Request) -> None:
        """``close``, and tell the log of the request how it went: counts and reasons, never text."""
        self.close()
        usage, reasons = self.usage, ",".join(sorted(self.reasons)) or None
        note(
            request,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=reasons,
        )


def usage_body(usage: Usage) -> dict[str, object]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def truncated(ids: list[int], keep: int | None, limit: int) -> list[int]:
    """The last ``keep`` ids of a prompt; -1 keeps what the context holds beside one new token."""
    if keep is None:
        return ids
    if keep < -1 or keep == 0:
        what = f"truncate_prompt_tokens must be at least 1, or -1 for the context, got {keep}"
        raise ApiError(400, what, param="truncate_prompt_tokens")
    return ids[-(limit - 1 if keep == -1 else keep) :]


@dataclass(frozen=True)
class StreamUsage:
    """Which chunks of a stream carry token counts: an extra last one, and every one."""

    last: bool = False
    each: bool = False

    @classmethod
    def of(cls, body: SamplingFields) -> StreamUsage:
        """What the request asks for; ApiError for options of no stream."""
        options = body.stream_options
        if options is None:
            return cls()
        if not body.stream:
            what = "stream_options is only allowed when stream is true"
            raise ApiError(400, what, param="stream_options")
        last = bool(options.include_usage)
        return cls(last, last and bool(options.continuous_usage_stats))

    def in_chunk(self, usage: Usage) -> dict[str, object]:
        """The ``usage`` field of a chunk: null while the counts are still to come, none at all if not asked for."""
        if not self.last:
            return {}
        return {"usage": usage_body(usage) if self.each else None}
