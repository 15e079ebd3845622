"""A server in a process of its own, so that it can be given signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A started ``serve`` command; ``url`` is known as soon as it listens."""

    def __init__(self, module: str, *options: str, **environ: str):
        argv = [sys.executable, "-m", *module.split(), "--port", "0", *options]
        self.process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **environ},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.until(r"(http://[^/]+)/\S*health")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Wait for a line on standard error; the first group of the pattern."""
        end = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found.group(1) if found.groups() else line
            assert not ended and time.monotonic() < end, "\n".join(self.lines)
            time.sleep(0.01)

    def ready(self) -> str:
        """Wait until it is warm; the URL."""
        self.until("^ready after")
        return self.url

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 60) -> int:
        """Wait for the end."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def server_process(module: str, *options: str, **environ: str) -> Iterator[ServerProcess]:
    """Start a server; it is killed at the end if it still runs."""
    server = ServerProcess(module, *options, **environ)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


class Streaming:
    """A streamed completion that is read in a thread of its own: its event lines, and whether it ended whole."""

    def __init__(self, url: str, max_tokens: int):
        self.events: list[str] = []
        self.broken: Exception | None = None
        self._begun = threading.Event()
        wish = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self._thread = threading.Thread(target=self._read, args=(url, wish), daemon=True)
        self._thread.start()
        assert self._begun.wait(30), self.broken

    def _read(self, url: str, wish: dict[str, object]) -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=wish, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line)
                        self._begun.set()
        except httpx.HTTPError as error:
            self.broken = error

    def wait(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join(60)
        assert not self._thread.is_alive()


TERM, INT = signal.SIGTERM, signal.SIGINT
