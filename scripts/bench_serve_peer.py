"""llama.cpp for bench_serve.py: prompts read and continued together in one batch, through its C API, without HTTP.

A process of its own: ``python scripts/bench_serve_peer.py FILE THREADS``; commands and answers are JSON lines.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_llama import SHORT, UBATCH, LlamaCpp  # noqa: E402
from scripts.bench_worker import die_with_parent, say  # noqa: E402


class Batch(LlamaCpp):
    """Greedy answers to several prompts at once."""

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds from the prompts to the last token, and the answers."""
        longest = max(map(len, prompts)) + new_tokens
        self._open(-(-longest // SHORT) * SHORT, len(prompts))
        self._clear()
        answers: list[list[int]] = [[] for _ in prompts]
        begin = time.perf_counter()
        for group in groups(prompts):
            rows = [(token, place, s) for s in group for place, token in enumerate(prompts[s])]
            for sequence, logits in zip(group, self._forward(rows), strict=True):
                answers[sequence].append(int(logits.argmax()))
        while len(answers[0]) < new_tokens:
            rows = [(ids[-1], len(prompts[s]) + len(ids) - 1, s) for s, ids in enumerate(answers)]
            for ids, logits in zip(answers, self._forward(rows), strict=True):
                ids.append(int(logits.argmax()))
        return time.perf_counter() - begin, answers


def groups(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of prompts that fit into one pass together."""
    found: list[list[int]] = [[]]
    room = UBATCH
    for number, prompt in enumerate(prompts):
        if len(prompt) > UBATCH:
            raise SystemExit(f"error: a prompt of {len(prompt)} tokens does not fit into a batch of {UBATCH}")
        if len(prompt) > room:
            found.append([])
            room = UBATCH
        found[-1].append(number)
        room -= len(prompt)
    return found


class Peer:
    """The process, stopped while nobody waits for it. ``None`` of ``start`` says why there is none."""

    def __init__(self, file: Path, threads: int, *flags: str):
        argv = [sys.executable, str(Path(__file__).resolve()), str(file), str(threads), *flags]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.about = self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command; its answer."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise ChildProcessError(f"llama.cpp ended with exit code {self.process.wait()}")


def better_switches(model: Batch, prompts: Sequence[Sequence[int]]) -> dict[str, bool]:
    """Those of ``settings`` that decode fastest."""
    spent = []
    begun = [prompt[:4] for prompt in prompts]
    for way in model.settings():
        model.set(**way)
        model.answer(begun, 2)
        spent.append((model.answer(begun, 8)[0], way))
    model.rest()
    return min(spent, key=lambda pair: pair[0])[1]


def main() -> None:
    """Load, then answer until standard input closes."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--no-repack", action="store_true")
    args = parser.parse_args()
    model = Batch(args.file, args.threads, not args.no_repack)
    say(**model.describe())
    way: dict[str, bool] | None = None
    for line in sys.stdin:
        command = json.loads(line)
        way = way or better_switches(model, command["prompts"])
        model.set(**way)
        seconds, answers = model.answer(command["prompts"], command["new_tokens"])
        say(seconds=seconds, tokens=sum(map(len, answers)), switches=way)


if __name__ == "__main__":
    main()
