"""The server under load, over real HTTP: many clients, a long prompt among streams, shared prompts; JSON and a table.

    python scripts/bench_serve.py --work WORK --output bench_serve
    python scripts/bench_serve.py --soak 10000 --output soak

The server is a process of its own, the clients are this one, both on the same machine. Weights are random numbers of a
published shape in int4, made first (no download) and kept in WORK. llama.cpp, where it is installed, answers the
same prompts in one batch through its C API in the same rounds, without HTTP. ``--soak`` instead sends many requests
of all kinds to the demo model, a part of them cancelled or malformed, then a signal; see bench_serve_soak.py.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, with_changes  # noqa: E402
from scripts.bench_checkpoint import make_all  # noqa: E402
from scripts.bench_report import machine  # noqa: E402
from scripts.bench_serve_client import at_once, gaps, in_turn, long_arrival  # noqa: E402
from scripts.bench_serve_peer import Peer  # noqa: E402
from scripts.bench_serve_process import Server  # noqa: E402

PLAIN_TOKENS = 151_643  # of the published vocabulary, control tokens not counted
QUIET = 24  # tokens of each stream before the long prompt comes
Values = dict[str, float]


@dataclass(frozen=True)
class Target:
    """A figure of a row that is to be reached; the median of the rounds counts."""

    row: str
    figure: str
    title: str
    limit: float
    at_least: bool

    def judge(self, rounds: list[Values]) -> dict[str, Any]:
        """What was found, as JSON."""
        values = [values[self.figure] for values in rounds]
        middle = statistics.median(values)
        return {
            "what": self.title,
            "bar": f"{'at least' if self.at_least else 'at most'} {self.limit:g}",
            "median": middle,
            "range": [min(values), max(values)],
            "rounds": len(values),
            "passed": middle >= self.limit if self.at_least else middle <= self.limit,
        }


TARGETS = (
    Target(
        "clients", "over_sequential", "clients at once : the same one after the other, total tok/s", 3.0, True
    ),
    Target("clients", "over_llama", "clients at once : llama.cpp Q4_0 in one batch, total tok/s", 1.1, True),
    Target(
        "long_prompt",
        "worst_gap_steps",
        "long prompt arrives: worst gap of a stream, in plain steps",
        3.0,
        False,
    ),
    Target(
        "shared_prompt",
        "second_over_first",
        "second request with the same beginning: time to first token",
        0.2,
        False,
    ),
)


class Bench:
    """The rounds of all rows against one server."""

    def __init__(self, args: argparse.Namespace, url: str, peer: Peer | None):
        self.args, self.url, self.peer = args, url, peer
        self.rounds: dict[str, list[Values]] = {}
        self.about: dict[str, Any] = {}

    def run(self) -> None:
        """Every row, round by round."""
        rows: dict[str, Callable[[int], Values]] = {
            "clients": self.clients,
            "long_prompt": self.long_prompt,
            "shared_prompt": self.shared_prompt,
        }
        for place in range(self.args.rounds):
            for name in self.args.rows:
                values = rows[name](place)
                self.rounds.setdefault(name, []).append(values)
                progress(
                    f"round {place + 1}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                )

    def clients(self, place: int) -> Values:
        """Different prompts at once, one after the other, and in llama.cpp's batch; in turns of another order."""
        args = self.args
        prompts = [[(7 * i + 31 * p) % 997 + 300 for p in range(args.prompt)] for i in range(args.clients)]
        tokens, found = args.clients * args.new, {}
        ways = [("at_once", at_once), ("in_turn", in_turn)]
        for name, way in ways[:: 1 if place % 2 else -1]:
            begin = time.perf_counter()
            streams = asyncio.run(way(self.url, prompts, args.new, f"{name} {place}"))
            found[f"{name}_tokens_per_s"] = tokens / (time.perf_counter() - begin)
            if any(len(stream.ids) != args.new for stream in streams):
                raise SystemExit("error: an answer has another length than was asked for")
            if name == "at_once":
                found["worst_first_token_s"] = max(stream.first for stream in streams)
        found["over_sequential"] = found["at_once_tokens_per_s"] / found["in_turn_tokens_per_s"]
        if self.peer is not None:
            answer = self.peer.ask(prompts=prompts, new_tokens=args.new)
            self.about["llama_switches"] = answer["switches"]
            found["llama_tokens_per_s"] = answer["tokens"] / answer["seconds"]
            found["over_llama"] = found["at_once_tokens_per_s"] / found["llama_tokens_per_s"]
        return found

    def long_prompt(self, place: int) -> Values:
        """The gaps between tokens of running streams while a long prompt is read beside them.

        A prompt is read in chunks, one in each step, so a gap is the time of a chunk. The streams get longer meanwhile,
        and so do their plain steps: each gap is rated by a plain step at its place, between the median before the
        prompt came and the one after it was read.
        """
        args = self.args
        prompt = [(13 * p + place) % 997 + 300 for p in range(args.long)]
        running, late = asyncio.run(long_arrival(self.url, args.streams, prompt, QUIET, f"long {place}"))
        # The first tokens come while the streams themselves are still being read.
        before = [gap for s in running for gap in gaps(s.times, s.times[4], late.sent)[:-1]]
        after = [gap for s in running for gap in gaps(s.times, late.times[0], math.inf)[1:]]
        pressed = [gaps(stream.times, late.sent, late.times[0]) for stream in running]
        first, last = statistics.median(before), statistics.median(after)
        steps = sorted(
            gap / (first + (last - first) * at / len(found))
            for found in pressed
            for at, gap in enumerate(found)
        )
        return {
            "plain_step_before_s": first,
            "plain_step_after_s": last,
            "worst_plain_gap_steps": max(max(before) / first, max(after) / last),
            "median_gap_steps": statistics.median(steps),
            "p99_gap_steps": steps[int(0.99 * len(steps))],
            "worst_gap_steps": steps[-1],
            "worst_gap_first_steps": max(max(found) for found in pressed) / first,
            "chunks": len(steps) / len(running),
            "first_token_s": late.first,
        }

    def shared_prompt(self, place: int) -> Values:
        """Time to the first token of two requests that begin alike, one after the other."""
        common = [(11 * p + place) % 997 + 300 for p in range(self.args.shared)]
        prompts = [common + [400 + i] * 16 for i in range(2)]
        first, second = asyncio.run(in_turn(self.url, prompts, 4, f"shared {place}"))
        return {
            "first_s": first.first,
            "second_s": second.first,
            "second_over_first": second.first / first.first,
        }


def judge(rounds: dict[str, list[Values]]) -> list[dict[str, Any]]:
    """All targets whose figures were measured."""
    return [
        target.judge(rounds[target.row])
        for target in TARGETS
        if rounds.get(target.row) and target.figure in rounds[target.row][0]
    ]


def made_vocabulary(folder: Path) -> Path:
    """A vocabulary file with as many tokens as the published one: single bytes, then runs of letters."""
    path = folder / "made.tiktoken"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_tokens())]
        path.write_bytes(b"".join(lines))
    return path


def _tokens() -> Iterator[bytes]:
    letters = [bytes([i]) for i in range(ord("a"), ord("z") + 1)]
    yield from (bytes([i]) for i in range(256))
    left, level = PLAIN_TOKENS - 256, letters
    while left:
        level = [a + b for a in level for b in letters][:left]
        yield from level
        left -= len(level)


def start_peer(file: Path, threads: int, notes: list[str]) -> Peer | None:
    """llama.cpp, if it is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        notes.append("llama.cpp: not installed")
        return None
    try:
        return Peer(file, threads)
    except ChildProcessError as error:
        notes.append(f"{error} with its own weight layouts (AMX); measured without them")
        return Peer(file, threads, "--no-repack")


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def text_of(result: dict[str, Any]) -> str:
    """The tables for a terminal; valid markdown, too."""
    about = result["machine"]
    lines = [
        f"{result['title']}; {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {result['date']}",
        "",
        "| target | bar | measured | least - greatest | rounds | |",
        "|---|---|---|---|---|---|",
    ]
    for target in result["targets"]:
        low, high = target["range"]
        verdict = "pass" if target["passed"] else "FAIL"
        cells = (target["what"], target["bar"], f"{target['median']:.2f}", f"{low:.2f} - {high:.2f}")
        lines.append(f"| {' | '.join(cells)} | {target['rounds']} | {verdict} |")
    lines += ["", "| figure (median of the rounds) | |", "|---|---|"]
    for row, rounds in result["rounds"].items():
        for name in rounds[0]:
            lines.append(f"| {row}: {name} | {statistics.median(values[name] for values in rounds):.4g} |")
    return "\n".join([*lines, "", *result["notes"]])


def report(text: str, result: dict[str, Any], output: Path | None) -> None:
    """Print the text; with ``output`` write OUTPUT.json and OUTPUT.md."""
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rows."""
    config = with_changes(SIZES[args.size], num_layers=args.layers) if args.layers else SIZES[args.size]
    wanted = {"int4": "int4"} | ({"llama-q4_0": "q4_0.gguf"} if "clients" in args.rows else {})
    notes = [note for note in make_all(work, config, wanted, args.threads, progress) if "llama" not in note]
    options = [
        str(work / "int4"),
        *("--vocab", str(made_vocabulary(work)), "--num-blocks", str(args.num_blocks)),
        *("--threads", str(args.threads), "--max-batch", str(max(args.clients, args.streams + 1))),
    ]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(*options))
        peer = start_peer(work / "q4_0.gguf", args.threads, notes) if "clients" in args.rows else None
        if peer is not None:
            stack.callback(peer.close)
        bench = Bench(args, server.url, peer)
        bench.run()
        shape = f"{args.size}{f' with {args.layers} layers' if args.layers else ''}"
        return {
            "title": f"{shape}, random int4 weights, {args.threads} threads, loopback",
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "options": {k: v for k, v in vars(args).items() if isinstance(v, int | list | str)},
            "llama": {**(peer.about if peer is not None else {}), **bench.about},
            "peak": vars(server.figures()),
            "rounds": bench.rounds,
            "targets": judge(bench.rounds),
            "notes": notes,
        }


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.8b", choices=sorted(SIZES), help="shape of the random weights")
    parser.add_argument("--layers", type=int, help="fewer layers than published (a quick look)")
    parser.add_argument("--rows", default=",".join(dict.fromkeys(t.row for t in TARGETS)))
    parser.add_argument("--rounds", type=int, default=3)
    for name, default, text in (
        ("clients", 16, "clients at once"),
        ("prompt", 64, "tokens of each of their prompts"),
        ("new", 128, "and of each answer"),
        ("streams", 4, "streams that run when the long prompt comes"),
        ("long", 4096, "its tokens"),
        ("shared", 1024, "tokens that two prompts have in common"),
        ("num-blocks", 768, "blocks of 16 tokens in the server's cache"),
        ("threads", len(os.sched_getaffinity(0)), "threads of the model, here and there"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--work", type=Path, help="folder that keeps the random weights (default: temporary)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--soak", type=int, metavar="N", help="send N requests to the demo model instead")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's random choices")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure: exit code 0 whatever the figures are. Soak: 1 if anything was wrong."""
    args = build_parser().parse_args(argv)
    args.rows = args.rows.split(",")
    unknown = set(args.rows) - {target.row for target in TARGETS}
    if unknown:
        raise SystemExit(f"error: unknown rows: {', '.join(sorted(unknown))}")
    if args.soak is not None:
        from scripts.bench_serve_soak import soak_demo

        found = soak_demo(args.soak, args.seed, progress)
        report(found.text(), found.as_json(), args.output)
        return 1 if found.problems else 0
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen-bench-")))
        result = measure(args, work)
        report(text_of(result), result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
