"""Tokens per second of this engine and its peers, side by side in one run; JSON on standard output.

    python scripts/bench.py --size 1.8b --contenders cpu,cpu-f32,transformers --json bench.json

Random weights of a published shape are written first (no download); every contender loads the same numbers. Each
runs in a process of its own that waits for commands, so the measurements alternate: A B C, A B C, ... Medians are of
the rounds, and ratios are taken within each round, since the machine may be shared.

contenders: cpu (weights as stored, bfloat16), cpu-f32 (the same numbers stored as float32), reference (plain
operators), transformers (Qwen2ForCausalLM in float32 on the exported checkpoint; needs torch and transformers).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, QwenConfig, with_changes  # noqa: E402

CONTENDERS = ("cpu", "cpu-f32", "reference", "transformers")


class Contender:
    """A worker process; ``ask`` sends one command and waits for its answer."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name = name
        command = [sys.executable, str(ROOT / "scripts" / "bench_worker.py"), name, str(folder), str(threads)]
        started = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._answer()
        self.loaded["start_to_ready_s"] = time.perf_counter() - started

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command; its answer as a mapping."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"error: contender {self.name} ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(description="Benchmark in one run, side by side.")
    parser.add_argument(
        "--size", default="1.8b", choices=sorted(SIZES), help="shape of the random checkpoint"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than published (a quick look)")
    parser.add_argument(
        "--contenders", default="cpu,cpu-f32,transformers", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every measurement (default 5)")
    parser.add_argument("--prefill", default="128,512", help="prompt lengths")
    parser.add_argument("--decode-tokens", type=int, default=16, help="tokens of one decoding measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print the result."""
    args = build_parser().parse_args(argv)
    names = args.contenders.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        print(f"error: unknown contender {unknown[0]!r}; known: {', '.join(CONTENDERS)}", file=sys.stderr)
        return 2
    work = args.work or Path(tempfile.mkdtemp(prefix="qwen-bench-"))
    try:
        config = SIZES[args.size]
        if args.layers:
            config = with_changes(config, num_layers=args.layers)
        result = run(args, names, config, work)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def run(args: argparse.Namespace, names: list[str], config: QwenConfig, work: Path) -> dict[str, Any]:
    """Make the checkpoints, run the rounds, and put the figures together."""
    from scripts.bench_checkpoint import folder_for, make_checkpoints

    make_checkpoints(work, config, names)
    lengths = [int(text) for text in args.prefill.split(",") if text]
    contenders = [Contender(name, folder_for(work, name), args.threads) for name in names]
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for done in range(args.rounds + 1):  # the first round warms up
        for contender in contenders:
            tasks = [(f"prefill_{n}", {"do": "prefill", "tokens": n}) for n in lengths]
            tasks.append(("decode", {"do": "decode", "tokens": args.decode_tokens}))
            for key, command in tasks:
                answer = contender.ask(**command)
                if done:
                    figures[contender.name].setdefault(key, []).append(answer["tokens_per_s"])
        print(f"round {done} of {args.rounds} done", file=sys.stderr)
    loads = {c.name: {**c.loaded, **c.ask(do="memory")} for c in contenders}
    for contender in contenders:
        contender.close()
    return {
        "machine": machine(),
        "threads": args.threads,
        "shape": {"size": args.size, "layers": config.num_layers, "hidden": config.hidden_size},
        "rounds": args.rounds,
        "contenders": {
            name: {
                "load": loads[name],
                "tokens_per_s": {key: summary(values) for key, values in figures[name].items()},
            }
            for name in names
        },
        "ratios": ratios(figures, names),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(figures: dict[str, dict[str, list[float]]], names: list[str]) -> dict[str, dict[str, float]]:
    """Per measurement: the median over the rounds of A / B for every pair."""
    out: dict[str, dict[str, float]] = {}
    for key in figures[names[0]]:
        for a in names:
            for b in names:
                if a != b:
                    pairs = [x / y for x, y in zip(figures[a][key], figures[b][key], strict=True)]
                    out.setdefault(key, {})[f"{a} / {b}"] = round(statistics.median(pairs), 3)
    return out


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


if __name__ == "__main__":
    sys.exit(main())
