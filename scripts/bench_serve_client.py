"""Streamed completions over real HTTP, with the time at which every token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

TIMEOUT = 1200.0


class Stream:
    """A completion while it is read: ``times`` has one entry a token, of ``time.perf_counter``.

    Tokens that come in one event have its time.
    """

    def __init__(self, client: httpx.AsyncClient, prompt: Sequence[int], new_tokens: int, salt: str):
        self._client = client
        self._body = {
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        self.sent = 0.0
        self.times: list[float] = []
        self.ids: list[int] = []

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    async def read(self) -> Stream:
        """Until it ends. Raises RuntimeError for anything but a whole answer."""
        self.sent = time.perf_counter()
        last = ""
        async with self._client.stream("POST", "/v1/completions", json=self._body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if line:
                    last = line
                    self._take(line)
        if last != "data: [DONE]":
            raise RuntimeError(f"the stream ended with {last[:500]}")
        return self

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        ids = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
        self.ids += ids
        self.times += [time.perf_counter()] * len(ids)


def open_client(url: str) -> httpx.AsyncClient:
    """A client with a connection for each stream."""
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))


async def at_once(url: str, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Stream]:
    """All prompts at the same time."""
    async with open_client(url) as client:
        return list(await asyncio.gather(*(Stream(client, p, new_tokens, salt).read() for p in prompts)))


async def in_turn(url: str, prompts: Sequence[Sequence[int]], new_tokens: int, salt: str) -> list[Stream]:
    """One prompt after the other."""
    async with open_client(url) as client:
        return [await Stream(client, p, new_tokens, salt).read() for p in prompts]


def gaps(times: Sequence[float], begin: float, end: float) -> list[float]:
    """Seconds between neighbouring tokens, for every pause that reaches into [begin, end]."""
    pairs = zip(times, times[1:], strict=False)
    return [after - before for before, after in pairs if after > begin and before < end]


async def long_arrival(
    url: str, streams: int, long_prompt: Sequence[int], quiet_tokens: int, salt: str
) -> tuple[list[Stream], Stream]:
    """Streams that run, then a long prompt beside them; they go on for as many tokens after it as before it."""
    async with open_client(url) as client:
        running = [Stream(client, [100 + i] * 16, 8000, salt) for i in range(streams)]
        tasks = [asyncio.ensure_future(stream.read()) for stream in running]
        try:
            while min(len(stream.times) for stream in running) < quiet_tokens:
                await _pause(tasks)
            late = await Stream(client, long_prompt, 1, salt).read()
            seen = min(len(stream.times) for stream in running)
            while min(len(stream.times) for stream in running) < seen + quiet_tokens:
                await _pause(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return running, late


async def _pause(tasks: Sequence[asyncio.Future[Stream]]) -> None:
    done, _ = await asyncio.wait(tasks, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
        raise RuntimeError("a stream ended before the long prompt was read")
