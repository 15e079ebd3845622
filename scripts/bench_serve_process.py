"""The server as a process of its own: started, looked at from outside, given signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

ROOT = Path(__file__).resolve().parents[1]
SERVE = "research.qwen.cli serve"
READY_SECONDS = 300.0


@dataclass(frozen=True)
class Figures:
    """What a process holds at one moment: resident MiB, threads, open files (sockets among them)."""

    mib: float
    threads: int
    files: int


class Server:
    """``python -m MODULE --port 0 OPTIONS``, ready when the constructor returns; killed at the end of ``with``.

    Raises SystemExit with the server's last lines if it does not get ready.
    """

    def __init__(self, *options: str, module: str = SERVE, **environ: str):
        argv = [sys.executable, "-m", *module.split(), "--port", "0", *options]
        environment = {**os.environ, **environ}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._until(r"(http://[^/]+)/\S*health")
        self._until("^(ready after)")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self._reader.join(5)

    def figures(self) -> Figures:
        """Of now."""
        folder = Path("/proc", str(self.process.pid))
        rows = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        files = len(os.listdir(folder / "fd"))
        return Figures(int(rows["VmRSS"].split()[0]) / 1024, int(rows["Threads"]), files)

    def metric(self, name: str) -> float:
        """The value of one of its own metrics without labels beside the model's."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(rf"^qwen_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if found is None:
            raise SystemExit(f"error: the server has no metric qwen_{name}")
        return float(found.group(1))

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float) -> int | None:
        """Wait for the end; None if it does not come."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            del self.lines[:-1000]

    def _until(self, pattern: str) -> str:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found.group(1)
            if ended:
                break
            time.sleep(0.01)
        self.process.kill()
        raise SystemExit("error: the server did not start:\n" + "\n".join(self.lines[-20:]))
