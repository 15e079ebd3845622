"""Speed of this engine and of its peers, side by side in one run: JSON, a table, a markdown file, a chart.

    python scripts/bench.py --work WORK --output bench

Random weights of a published shape are made first (no download) and kept in WORK; every contender loads the same
numbers. A round starts the contenders of a group as processes of their own, alternates between them row by row
(A B C, A B C, ...; all but one are stopped meanwhile), and ends them; so every round has its own loading time, time to
first token and memory. Ratios are taken within each round, since a machine may be shared. docs/benchmarks.md says
what is measured and how, and how to install the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, with_changes  # noqa: E402
from scripts.bench_checkpoint import make_all  # noqa: E402
from scripts.bench_report import machine, write_report  # noqa: E402
from scripts.bench_rows import CONTENDERS, DEFAULT, QUICK, ROWS, Figures, Row, judge  # noqa: E402

CALIBRATED = tuple(dict.fromkeys(row.like for row in ROWS.values()))


class Died(Exception):
    """A worker ended without an answer."""


class Worker:
    """A process of its own, stopped while nobody waits for it."""

    def __init__(self, kind: str, path: Path, threads: int, *flags: str, script: str = "bench_worker.py"):
        command = [sys.executable, str(ROOT / "scripts" / script), kind, str(path), str(threads)]
        self.name = f"{kind}, {path.name}"
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.facts = self._answer()
        self.facts["first_token_s"] = time.perf_counter() - begin
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command; its answer."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        try:
            return self._answer()
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise Died(f"({self.name}) ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


class Bench:
    """The rounds and what they found."""

    def __init__(self, args: argparse.Namespace, names: list[str], rows: list[str], work: Path):
        self.names, self.rows, self.work = names, {name: ROWS[name] for name in rows}, work
        self.rounds, self.threads = args.rounds, args.threads
        config = with_changes(SIZES[args.size], num_layers=args.layers) if args.layers else SIZES[args.size]
        self.config, self.kv_bytes = config, 2 * config.num_layers * config.hidden_size * 2
        self.figures: Figures = {row: {} for row in rows}
        self.limits: Figures = {row: {} for row in rows}
        self.bandwidth: list[float] = []
        self.facts: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        self.about: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, dict[str, dict[str, bool]]] = {}
        self.flags: dict[str, list[str]] = {name: [] for name in names}
        self.notes: list[str] = []

    def groups(self) -> Iterator[list[str]]:
        """Contenders that are in memory together."""
        for group in sorted({CONTENDERS[name].group for name in self.names}):
            yield [name for name in self.names if CONTENDERS[name].group == group]

    def start(self, name: str) -> Worker:
        """A worker that is ready."""
        about = CONTENDERS[name]
        return Worker(about.kind, self.work / about.file, self.threads, *self.flags[name])

    def calibrate(self) -> None:
        """Leave out who cannot run, and find the better switches of those who have some."""
        for name in list(self.names):
            begin = time.perf_counter()
            try:
                worker = self.start(name)
            except Died as error:
                if CONTENDERS[name].kind != "llama":
                    raise SystemExit(f"error: contender {name} {error}") from None
                self.flags[name] = ["--no-repack"]
                self.notes.append(
                    f"{name}: {error} with llama.cpp's own weight layouts (AMX); measured without them"
                )
                worker = self.start(name)
            with contextlib.closing(worker):
                for row in CALIBRATED:
                    if any(r.like == row for r in self.rows.values()):
                        self._better(name, worker, row)
            progress(f"{name} runs ({time.perf_counter() - begin:.0f} s)")

    def _better(self, name: str, worker: Worker, row: str) -> None:
        ways = worker.facts["settings"]
        if len(ways) < 2:
            return
        command = {**ROWS[row].command, "budget_s": 2.0, "once": True}
        spent = [worker.ask(**command, setting=way)["seconds"] for way in ways]
        self.settings.setdefault(name, {})[row] = ways[spent.index(min(spent))]

    def run(self) -> None:
        """All rounds."""
        with contextlib.closing(Worker("read", self.work, self.threads)) as reader:
            for place in range(self.rounds):
                for group in self.groups():
                    self._group(place, group, reader)
                progress(f"round {place + 1} of {self.rounds} done")

    def _group(self, place: int, group: list[str], reader: Worker) -> None:
        with contextlib.ExitStack() as stack:
            workers = {}
            for name in group:
                workers[name] = stack.enter_context(contextlib.closing(self.start(name)))
                facts = workers[name].facts
                self.about[name] = {
                    k: facts[k] for k in ("version", "system", "isa", "weight_bytes") if k in facts
                }
                for key in ("load_s", "first_token_s", "peak_mib", "anonymous_mib"):
                    self.facts[name].setdefault(key, []).append(facts[key])
            for key, row in self.rows.items():
                if place >= row.most_rounds:
                    continue
                speed = reader.ask()["bytes_per_s"]
                self.bandwidth.append(speed)
                for name in group[place % len(group) :] + group[: place % len(group)]:
                    self._measure(place, key, row, name, workers[name], speed)

    def _measure(self, place: int, key: str, row: Row, name: str, worker: Worker, speed: float) -> None:
        setting = self.settings.get(name, {}).get(row.like)
        answer = worker.ask(**row.command, setting=setting)
        self.figures[key].setdefault(name, {})[place] = answer["tokens"] / answer["seconds"]
        if row.command["do"] == "decode":
            read = worker.facts["weight_bytes"] + self.kv_bytes * row.context * row.command["sequences"]
            self.limits[key].setdefault(name, {})[place] = read / answer["seconds"] / speed
        self.facts[name].setdefault(f"peak_mib_after_{key}", []).append(answer["peak_mib"])

    def result(self, size: str) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "threads": self.threads,
            "shape": {"size": size, "layers": self.config.num_layers, "hidden": self.config.hidden_size},
            "rounds": self.rounds,
            "notes": self.notes,
            "contenders": self.about,
            "settings": self.settings,
            "read_bytes_per_s": self.bandwidth,
            "start": self.facts,
            "tokens_per_s": self.figures,
            "share_of_bandwidth": self.limits,
            "targets": judge(self.figures, self.limits),
        }


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.8b", choices=sorted(SIZES), help="shape of the random weights")
    parser.add_argument("--layers", type=int, help="fewer layers than published (a quick look)")
    parser.add_argument("--contenders", default=",".join(DEFAULT), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, help="default 5, quick 2")
    parser.add_argument("--quick", action="store_true", help=f"2 rounds of {', '.join(QUICK)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder that keeps the random weights (default: temporary)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    return parser


def chosen(text: str, known: Any, what: str) -> list[str]:
    """Names of an option, in the order of the table."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise SystemExit(f"error: unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit code 0 whatever the figures are."""
    args = build_parser().parse_args(argv)
    names = chosen(args.contenders, CONTENDERS, "contender")
    rows = chosen(args.rows or ",".join(QUICK if args.quick else ROWS), ROWS, "row")
    args.rounds = args.rounds or (2 if args.quick else 5)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen-bench-")))
        work = work / (f"{args.size}-{args.layers}" if args.layers else args.size)
        bench = Bench(args, names, rows, work)
        bench.notes += make_all(
            work, bench.config, {n: CONTENDERS[n].file for n in names}, args.threads, progress
        )
        bench.names = [n for n in names if (work / CONTENDERS[n].file).exists()]
        try:
            bench.calibrate()
            bench.run()
        except Died as error:
            print(f"error: a contender {error}", file=sys.stderr)
            return 1
        write_report(bench.result(args.size), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
