"""Many requests of all kinds at once against one server, some cancelled, some malformed; then a signal under load.

What must hold: no status from 500 on (but 503 once the server drains), every refusal in the error envelope, every
answer that was read to its end equal to that of the same request alone, and nothing that grows: blocks, memory,
threads and open files are looked at from outside whenever nothing runs. A phase ends with all connections closed.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from scripts.bench_report import machine
from scripts.bench_serve_process import Figures, Server
from scripts.bench_serve_requests import Answer, Bad, Wish, malformed, wishes

CLIENTS = 24
PHASES = 12
CANCELLED, MALFORMED = 0.2, 0.1
SETTLE_SECONDS = 20.0  # until nothing runs any more once the clients are done
EXIT_SECONDS = 15.0  # beside the grace time
SLACK = {"mib": 8.0, "threads": 8.0, "files": 2.0}  # what may be more in the second half of a soak
BROKEN_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass
class Found:
    """What a soak has seen."""

    requests: int
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    idle: list[Figures] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def wrong(self, text: str) -> None:
        """Note a problem."""
        self.problems.append(text[:600])

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "requests": self.requests,
            "kinds": dict(self.kinds),
            "statuses": dict(self.statuses),
            "idle": [vars(figures) for figures in self.idle],
            "facts": self.facts,
            "problems": self.problems,
        }

    def text(self) -> str:
        """A table for a terminal; valid markdown, too."""
        rows = [("requests", str(self.requests)), ("problems", str(len(self.problems)))]
        rows += [(f"requests: {kind}", str(count)) for kind, count in sorted(self.kinds.items())]
        rows += [(f"status {status}", str(count)) for status, count in sorted(self.statuses.items())]
        for name, unit in (("mib", "MiB"), ("threads", "threads"), ("files", "open files")):
            values = [getattr(figures, name) for figures in self.idle]
            rows.append((f"{unit} whenever nothing ran", ", ".join(f"{value:.0f}" for value in values)))
        rows += [(name, f"{value:g}") for name, value in self.facts.items()]
        lines = ["| soak | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join([*lines, *self.problems[:20]])


class Soak:
    """One soak of one server.

    Args:
        pause: seconds up to which a client that leaves waits before it does.
    """

    def __init__(self, server: Server, requests: int, seed: int, pause: float = 0.3):
        self.server, self.random, self.pause = server, random.Random(seed), pause
        self.found = Found(requests)
        self.wishes, self.bad = wishes(), malformed()
        self.alone: list[Answer] = []

    def run(self, phases: int, progress: Callable[[str], None]) -> None:
        """All requests, in phases between which nothing runs."""
        asyncio.run(self._compute_alone())
        begin = time.monotonic()
        for phase in range(phases):
            share = self.found.requests * (phase + 1) // phases - self.found.requests * phase // phases
            asyncio.run(self._phase(share))
            self._settle()
            self.found.idle.append(self.server.figures())
            progress(
                f"phase {phase + 1} of {phases}: {self.found.idle[-1]}, {len(self.found.problems)} problems"
            )
        self.found.facts["seconds"] = round(time.monotonic() - begin, 1)
        for name in ("num_preemptions_total", "generation_tokens_total", "prefix_cache_hits_total"):
            self.found.facts[name] = self.server.metric(name)
        self.found.problems += grown(self.found.idle)

    async def _compute_alone(self) -> None:
        """Nothing beside it, and nothing found in the cache."""
        async with self._client() as client:
            for number, wish in enumerate(self.wishes):
                answer = await self._whole(client, wish, f"alone {number}")
                if answer is None:
                    raise SystemExit(f"error: {wish} has no answer: {self.found.problems}")
                self.alone.append(answer)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, timeout=120)

    async def _phase(self, requests: int) -> None:
        left = iter(range(requests))
        async with self._client() as client:
            await asyncio.gather(*(self._work(client, left) for _ in range(min(CLIENTS, requests))))

    async def _work(self, client: httpx.AsyncClient, left: Any) -> None:
        for _ in left:
            await self._one(client)

    async def _one(self, client: httpx.AsyncClient) -> None:
        draw = self.random.random()
        number, stream = self.random.randrange(len(self.wishes)), self.random.random() < 0.5
        try:
            if draw < MALFORMED:
                await self._refused(client)
            elif draw < MALFORMED + CANCELLED:
                await self._leave(client, self.wishes[number], stream)
            else:
                await self._compared(client, number, stream)
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            self.found.wrong(f"{type(error).__name__}: {error}")

    async def _compared(self, client: httpx.AsyncClient, number: int, stream: bool) -> None:
        wish = self.wishes[number]
        kind = ("streamed " if stream else "whole ") + wish.path.removeprefix("/v1/")
        self.found.kinds[kind] += 1
        answer = await (self._streamed if stream else self._whole)(client, wish)
        if answer is not None and answer != self.alone[number]:
            self.found.wrong(f"{wish} beside others: {answer}; alone: {self.alone[number]}")

    async def _whole(self, client: httpx.AsyncClient, wish: Wish, salt: str = "") -> Answer | None:
        response = await client.post(wish.path, json=wish.asked(False, salt))
        self.found.statuses[response.status_code] += 1
        if response.status_code != 200:
            self.found.wrong(f"status {response.status_code} for {wish}: {response.text}")
            return None
        answer = Answer()
        answer.take(response.json())
        return answer

    async def _streamed(self, client: httpx.AsyncClient, wish: Wish) -> Answer | None:
        async with client.stream("POST", wish.path, json=wish.asked(True)) as response:
            self.found.statuses[response.status_code] += 1
            answer, last = Answer(), ""
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    answer.take(json.loads(line[6:]))
                last = line or last
        if last != "data: [DONE]":
            self.found.wrong(f"status {response.status_code}, the stream ended with {last} for {wish}")
            return None
        return answer

    async def _leave(self, client: httpx.AsyncClient, wish: Wish, stream: bool) -> None:
        """Close the connection in the middle of an answer, or of a wait for it."""
        self.found.kinds["left"] += 1
        wait = self.random.uniform(0, self.pause)
        try:
            async with asyncio.timeout(wait):
                await (self._streamed if stream else self._whole)(client, wish)
        except TimeoutError:
            self.found.kinds["left, in the middle"] += 1

    async def _refused(self, client: httpx.AsyncClient) -> None:
        self.found.kinds["malformed"] += 1
        bad = self.random.choice([*self.bad, None])
        if bad is None:
            await self._half_a_body()
            return
        response = await client.post(bad.path, content=bad.content, headers={"Content-Type": bad.kind})
        self.found.statuses[response.status_code] += 1
        if not 400 <= response.status_code < 500 or not in_envelope(response):
            self.found.wrong(f"status {response.status_code} for {shown(bad)}: {response.text}")

    async def _half_a_body(self) -> None:
        url = httpx.URL(self.server.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(BROKEN_BODY + b'Content-Length: 1000\r\n\r\n{"prompt": "')
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _settle(self) -> None:
        """Wait until the server is idle; every block must be free then."""
        end = time.monotonic() + SETTLE_SECONDS
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(values := [self.server.metric(name) for name in names]):
            if time.monotonic() > end:
                self.found.wrong(f"nobody asks any more, yet {dict(zip(names, values, strict=True))}")
                return
            time.sleep(0.05)
        time.sleep(0.2)  # the connection of the last look


def in_envelope(response: httpx.Response) -> bool:
    """Whether the body is an error as OpenAI's clients read it."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


def shown(bad: Bad) -> str:
    """For a report."""
    return f"{bad.path} {bad.content[:120]!r}"


def grown(idle: list[Figures]) -> list[str]:
    """What the second half of the looks holds more of than the first, by their medians.

    The first third is warming up: caches with a bound fill. A pool of threads is larger or smaller by what it did last.
    """
    seen = idle[len(idle) // 3 :]
    if len(seen) < 4:
        return []
    early, late = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    problems = []
    for name, slack in SLACK.items():
        before, after = (statistics.median(getattr(look, name) for look in part) for part in (early, late))
        if after > before + slack:
            problems.append(f"{name} grew from {before:g} to {after:g}")
    return problems


# ---- the end ----


async def _until_the_end(url: str, wish: Wish, found: Found) -> None:
    """A stream that is open when the signal comes: it ends whole or with an error event."""
    last = ""
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=120) as client,
            client.stream("POST", wish.path, json=wish.asked(True)) as response,
        ):
            async for line in response.aiter_lines():
                last = line or last
    except httpx.HTTPError as error:
        found.wrong(f"at the end a stream broke: {type(error).__name__}: {error}; its last line: {last}")
        return
    if last == "data: [DONE]":
        found.kinds["at the end: streams that finished"] += 1
    elif last.startswith("data: {") and "error" in json.loads(last[6:]):
        found.kinds["at the end: streams with an error event"] += 1
    else:
        found.wrong(f"at the end a stream of status {response.status_code} ended with {last}")


async def _knock(url: str, found: Found) -> None:
    """New requests while the server drains: 503, or no connection once it is gone."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while True:
            try:
                response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            except httpx.HTTPError:
                return
            found.kinds[f"at the end: new requests with status {response.status_code}"] += 1
            if response.status_code not in (200, 503):
                found.wrong(f"at the end: status {response.status_code}: {response.text}")
            await asyncio.sleep(0.1)


def _at_hand(server: Server) -> float:
    """Requests that run or wait."""
    return server.metric("num_requests_running") + server.metric("num_requests_waiting")


async def _end_under_load(server: Server, found: Found, lengths: list[int]) -> float:
    """The signal comes when all streams are known to the server; when that was (``time.monotonic``)."""
    body = {"prompt": "a", "ignore_eos": True, "temperature": 0}
    streams = [
        asyncio.ensure_future(
            _until_the_end(server.url, Wish("/v1/completions", {**body, "max_tokens": n}), found)
        )
        for n in lengths
    ]
    end = time.monotonic() + SETTLE_SECONDS
    while (at_hand := await asyncio.to_thread(_at_hand, server)) < sum(not one.done() for one in streams):
        if time.monotonic() > end:
            found.wrong(f"only {at_hand:g} of {len(lengths)} streams have reached the server")
            break
    found.facts["streams at the signal"] = at_hand
    begin = time.monotonic()
    server.terminate()
    await asyncio.gather(*streams, _knock(server.url, found))
    return begin


def end_under_load(server: Server, found: Found, lengths: list[int], grace: float) -> None:
    """SIGTERM while streams of these lengths run."""
    begin = asyncio.run(_end_under_load(server, found, lengths))
    code = server.exit_code(grace + EXIT_SECONDS)
    found.facts["seconds from the signal to the end"] = round(time.monotonic() - begin, 2)
    if code != 0:
        found.wrong(f"after SIGTERM the exit code was {code}")
    if time.monotonic() - begin > grace + EXIT_SECONDS:
        found.wrong("the server took much longer than its grace time")


def soak_demo(requests: int, seed: int, progress: Callable[[str], None], phases: int = PHASES) -> Found:
    """A soak of the demo model with a cache so small that requests have to give up their blocks, then SIGTERM."""
    grace = 4.0
    with Server("--num-blocks", "72", "--grace", f"{grace:g}", "--log-level", "error") as server:
        soak = Soak(server, requests, seed)
        soak.run(phases, progress)
        end_under_load(server, soak.found, [20] * 6 + [1000] * 10, grace)
    return soak.found
