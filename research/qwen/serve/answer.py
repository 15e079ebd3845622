"""From the model thread to the event loop: the deltas of the prompts of one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import LogitsProcessor
from research.qwen.messages import Delta, Usage
from research.qwen.serve.errors import ApiError
from research.qwen.serve.state import ServerState


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


class Answers:
    """The prompts of one HTTP request while they run. Made and used on the event loop.

    ``start`` submits all or none. Iterating yields (number of the prompt, delta) as they come; ``usage`` then holds
    the sum over all prompts. ``close`` cancels whatever still runs, so a client that left frees its blocks at once.
    """

    def __init__(self) -> None:
        self.usage = Usage(0, 0)
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue()
        self._running: dict[int, Cancellable] = {}

    def start(self, state: ServerState, asks: Sequence[Ask]) -> None:
        """Submit every prompt. Raises what the scheduler raises; then none of them runs."""
        try:
            for number, ask in enumerate(asks):
                options = {"processors": ask.processors} if ask.processors is not None else {}
                self._running[number] = state.submit(
                    ask.prompt_ids, ask.params, self._deliver(number), cache_salt=ask.cache_salt, **options
                )
        except BaseException:
            self.close()
            raise

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
        while self._running:
            number, item = await self._inbox.get()
            if isinstance(item, BaseException):
                self._running.pop(number, None)
                self.close()
                raise item
            if item.usage is not None:
                self._running.pop(number, None)
                self.usage = _sum(self.usage, item.usage)
            yield number, item

    def close(self) -> None:
        """Cancel what still runs."""
        for ticket in self._running.values():
            ticket.cancel()
        self._running.clear()


def _sum(left: Usage, right: Usage) -> Usage:
    return replace(
        left,
        prompt_tokens=left.prompt_tokens + right.prompt_tokens,
        completion_tokens=left.completion_tokens + right.completion_tokens,
        cached_tokens=left.cached_tokens + right.cached_tokens,
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
