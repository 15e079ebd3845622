"""Fine-tuning side by side with transformers + peft + torch on the same weights and batches: JSON and tables.

    python scripts/bench_finetune.py --work WORK --output finetune

Both sides are processes of their own, alive together; whoever does not make a step is stopped. They take turns step by
step on the same batches (the first one another in every round), and a round starts both anew, so that each has its
own peak memory. Ratios are taken within a round, since a machine may be shared. docs/benchmarks.md says what is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, QwenConfig, with_changes  # noqa: E402
from scripts.bench import Worker, progress  # noqa: E402
from scripts.bench_checkpoint import _python, write_random  # noqa: E402
from scripts.bench_report import figure, machine  # noqa: E402

VOCAB = 151643
SIDES = ("cpu", "peer")
AGREE = 1e-3


@dataclass(frozen=True)
class Row:
    """What is measured: ``texts`` is how the batches are made, ``compared`` whether the losses must agree."""

    title: str
    method: str
    texts: str = (
        "whole"  # rows full of tokens | packed | padded (to the longest) | padded-max (to the maximum)
    )
    dropout: float = 0.0
    sides: tuple[str, ...] = SIDES
    compared: bool = False
    rounds: int = 9


ROWS = {
    "full": Row("full, float32", "full", compared=True),
    "lora": Row("LoRA, rank 64 on all linear layers, no dropout", "lora", compared=True),
    "lora_dropout": Row("LoRA with dropout 0.05", "lora", dropout=0.05),
    "full_bf16": Row(
        "full; torch with weights and state in bfloat16", "full", sides=("cpu", "peer-bf16"), rounds=1
    ),
    "lora_bf16": Row("LoRA; torch in bfloat16", "lora", sides=("cpu", "peer-bf16"), rounds=1),
    "short_packed": Row("full, short dialogues, packed", "full", "packed", sides=("cpu",), rounds=2),
    "short": Row("full, short dialogues, not packed", "full", "padded", rounds=2),
    "short_max": Row(
        "the same, padded to the maximum as the published recipe does", "full", "padded-max", rounds=2
    ),
}


class Short:
    """Random dialogues of 24 to 120 tokens, labelled but for the first four of each; what ``Batches`` reads."""

    def __init__(self, count: int):
        rng = np.random.default_rng(5)
        self._lengths = rng.integers(24, 121, count)
        self._seeds = rng.integers(0, 1 << 31, count)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> Any:
        """Tokens of each."""
        return self._lengths.tolist()

    def __getitem__(self, index: int) -> Any:
        from research.qwen.train.data import Sample

        ids = np.random.default_rng(self._seeds[index]).integers(0, VOCAB, self._lengths[index]).tolist()
        return Sample(ids, [-100] * 4 + ids[4:])


def make_batches(folder: Path, row: Row, rows: int, length: int, steps: int) -> list[Path]:
    """The batches of a row as files, the same for all sides."""
    if row.texts == "whole":
        rng = np.random.default_rng(3)
        made = []
        for _ in range(steps):
            ids = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
            places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
            made.append((ids, ids, places, np.zeros_like(ids)))
    else:
        made = _short_batches(row, rows, length, steps)
    files = []
    for i, arrays in enumerate(made):
        files.append(folder / f"{row.texts}-{i}.npz")
        np.savez(files[-1], **dict(zip(("ids", "labels", "positions", "segments"), arrays, strict=True)))
    return files


def _short_batches(row: Row, rows: int, length: int, steps: int) -> list[Any]:
    from research.qwen.train.batches import Batches

    batches = Batches(
        Short(2000),
        rows,
        length,
        packing=row.texts == "packed",
        pad="max" if row.texts == "padded-max" else "multiple",
        pad_multiple=1,
    )
    out = []
    for batch in batches.epoch(0):
        out.append((batch.ids, batch.labels, batch.positions, batch.segments))
        if len(out) == steps:
            break
    return out


def run_round(args: argparse.Namespace, row: Row, files: list[Path], place: int) -> dict[str, Any]:
    """One round: side -> what it said at the start and of every step."""
    out: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        flags = ("--method", row.method, "--dropout", str(row.dropout))
        for side in row.sides:
            worker = Worker(side, args.work, args.threads, *flags, script="bench_finetune_worker.py")
            workers[side] = stack.enter_context(contextlib.closing(worker))
            out[side] = {"facts": worker.facts, "steps": []}
        sides = row.sides[place % len(row.sides) :] + row.sides[: place % len(row.sides)]
        for file in files:
            for side in sides:
                out[side]["steps"].append(workers[side].ask(batch=str(file)))
    return out


def judge(row: Row, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, ranges and ratios of a row; the first step of every process does not count (compilation)."""
    seconds = {
        s: [statistics.median(x["seconds"] for x in r[s]["steps"][1:]) for r in rounds] for s in row.sides
    }
    tokens = {s: statistics.median(x["tokens"] for x in rounds[0][s]["steps"][1:]) for s in row.sides}
    speed = {
        s: [
            sum(x["tokens"] for x in r[s]["steps"][1:]) / sum(x["seconds"] for x in r[s]["steps"][1:])
            for r in rounds
        ]
        for s in row.sides
    }
    peak = {s: [max(x["peak_mib"] for x in r[s]["steps"]) for r in rounds] for s in row.sides}
    out: dict[str, Any] = {
        "title": row.title,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": speed,
        "peak_mib": peak,
        "losses": {s: [x["loss"] for x in rounds[0][s]["steps"]] for s in row.sides},
        "about": {s: rounds[0][s]["facts"] for s in row.sides},
    }
    if len(row.sides) == 2:
        mine, other = row.sides
        out["time_ratio"] = [a / b for a, b in zip(seconds[mine], seconds[other], strict=True)]
        out["memory_ratio"] = [a / b for a, b in zip(peak[mine], peak[other], strict=True)]
    if row.compared:
        mine, other = (out["losses"][s] for s in row.sides)
        out["loss_difference"] = max(abs(a - b) for a, b in zip(mine, other, strict=True))
    return out


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached and what was."""
    out = []

    def add(what: str, value: float, bound: float, at_most: bool = True) -> None:
        passed = value <= bound if at_most else value >= bound
        out.append({"what": what, "value": value, "bound": bound, "at_most": at_most, "passed": passed})

    for key in ("full", "lora", "lora_dropout"):
        if key in found:
            add(f"{key}: step time, ours / theirs", statistics.median(found[key]["time_ratio"]), 1.0)
            add(f"{key}: peak memory, ours / theirs", statistics.median(found[key]["memory_ratio"]), 1.1)
        if "loss_difference" in found.get(key, {}):
            add(f"{key}: greatest difference of a loss", found[key]["loss_difference"], AGREE)
    speed = {k: {s: statistics.median(v) for s, v in found[k]["tokens_per_s"].items()} for k in found}
    if "short_packed" in speed:
        for key, side in (("short", "cpu"), ("short", "peer"), ("short_max", "cpu"), ("short_max", "peer")):
            if key in speed:
                name = f"tokens/s packed, against {key} {'ours' if side == 'cpu' else 'theirs'}"
                add(name, speed["short_packed"]["cpu"] / speed[key][side], 2.0, at_most=False)
    return out


def text_of(result: dict[str, Any]) -> str:
    """Tables for a terminal and for a page."""
    lines = [
        "| | side | s per step | tokens/s | peak GiB | time, ours / theirs | memory | loss apart |",
        "|" + "---|" * 8,
    ]
    for found in result["rows"].values():
        for side, seconds in found["seconds"].items():
            cells = [found["title"], side, spread(seconds), spread(found["tokens_per_s"][side])]
            cells.append(spread([x / 1024 for x in found["peak_mib"][side]]))
            ratios = side.startswith("peer") and "time_ratio" in found
            cells += [spread(found["time_ratio"]), spread(found["memory_ratio"])] if ratios else ["", ""]
            cells.append(f"{found['loss_difference']:.1e}" if ratios and "loss_difference" in found else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| target | measured | bound | |", "|---|---|---|---|"]
    for target in result["targets"]:
        bound = f"{'at most' if target['at_most'] else 'at least'} {target['bound']:g}"
        verdict = "pass" if target["passed"] else "FAIL"
        lines.append(f"| {target['what']} | {target['value']:.3g} | {bound} | {verdict} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median and range."""
    middle = figure(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({figure(min(values))} - {figure(max(values))})"


def shape(args: argparse.Namespace) -> QwenConfig:
    """The model of the benchmark."""
    return with_changes(
        SIZES["1.8b"], num_layers=args.layers, hidden_size=1024, num_heads=8, intermediate_size=5504
    )


def prepare(work: Path, config: QwenConfig) -> None:
    """Random weights of the shape as a Qwen folder and, the same, as a Qwen2 folder."""
    write_random(work / "qwen", config, "float32")
    if not (work / "qwen2").exists():
        _python(
            "convert_weight.py",
            "--export",
            "qwen2",
            "--torch_ckpt_dir",
            work / "qwen",
            "--output",
            work / "qwen2",
        )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit code 0 whatever the figures are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--steps", type=int, default=4, help="measured steps of a process, after one that warms up"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder that keeps the random weights (default: temporary)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(argv)
    unknown = [name for name in args.rows.split(",") if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    with contextlib.ExitStack() as stack:
        args.work = args.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen-finetune-"))
        )
        prepare(args.work, shape(args))
        found = {}
        for key in args.rows.split(","):
            row = replace(ROWS[key], rounds=min(args.rounds, ROWS[key].rounds))
            files = make_batches(args.work, row, args.batch, args.length, args.steps + 1)
            found[key] = judge(row, [run_round(args, row, files, i) for i in range(row.rounds)])
            progress(f"{key}: {json.dumps({k: v for k, v in found[key].items() if k.endswith('ratio')})}")
    result = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads,
        "shape": shape(args).to_hf_dict(),
        "batch": [args.batch, args.length],
        "rows": found,
        "targets": targets(found),
    }
    print(text_of(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text_of(result) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
