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
from dataclasses import dataclass
from itertools import islice
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
AGREE = 1e-3


@dataclass(frozen=True)
class Column:
    """Who makes a step of what: ``texts`` is whole (rows full of tokens), packed, padded (to the longest) or padded-max
    (to the maximum, as the published recipe does)."""

    label: str
    side: str = "cpu"
    texts: str = "whole"


OURS, THEIRS, HALF = Column("ours"), Column("theirs", "peer"), Column("theirs in bfloat16", "peer-bf16")
SHORT = (
    Column("ours, packed", "cpu", "packed"),
    Column("ours, a dialogue a row", "cpu", "padded"),
    Column("theirs, padded to the longest", "peer", "padded"),
    Column("theirs, padded to the maximum", "peer", "padded-max"),
)


@dataclass(frozen=True)
class Row:
    """What is measured; ratios are those of the first column to each other one. ``compared``: losses must agree."""

    title: str
    method: str
    columns: tuple[Column, ...] = (OURS, THEIRS)
    dropout: float = 0.0
    compared: bool = False
    rounds: int = 9


ROWS = {
    "full": Row("full", "full", compared=True),
    "lora": Row("LoRA, rank 64 on all linear layers, no dropout", "lora", compared=True),
    "lora_dropout": Row("LoRA, dropout 0.05", "lora", dropout=0.05),
    "short": Row("full, dialogues of 24 to 120 tokens", "full", SHORT),
    "short_lora": Row("LoRA, dialogues of 24 to 120 tokens", "lora", SHORT),
    "full_bf16": Row("full", "full", (OURS, HALF), rounds=1),
    "lora_bf16": Row("LoRA, no dropout", "lora", (OURS, HALF), rounds=1),
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
        return self._lengths

    def __getitem__(self, index: int) -> Any:
        from research.qwen.train.data import Sample

        ids = np.random.default_rng(self._seeds[index]).integers(0, VOCAB, self._lengths[index]).tolist()
        return Sample(ids, [-100] * 4 + ids[4:])


def make_batches(folder: Path, texts: str, rows: int, length: int, steps: int) -> list[Path]:
    """Batches as files, the same for all sides."""
    names = ("ids", "labels", "positions", "segments")
    files = []
    for i, arrays in enumerate((_whole if texts == "whole" else _short)(texts, rows, length, steps)):
        files.append(folder / f"{texts}-{i}.npz")
        np.savez(files[-1], **dict(zip(names, arrays, strict=True)))
    return files


def _whole(texts: str, rows: int, length: int, steps: int) -> list[Any]:
    rng = np.random.default_rng(3)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    made = [rng.integers(0, VOCAB, (rows, length)).astype(np.int32) for _ in range(steps)]
    return [(ids, ids, places, np.zeros_like(ids)) for ids in made]


def _short(texts: str, rows: int, length: int, steps: int) -> list[Any]:
    from research.qwen.train.batches import Batches

    pad: Any = "max" if texts == "padded-max" else "multiple"
    batches = Batches(Short(2000), rows, length, packing=texts == "packed", pad=pad, pad_multiple=1)
    made = islice(batches.epoch(0), steps)
    return [(b.ids, b.labels, b.positions, b.segments) for b in made]


Said = dict[str, dict[str, Any]]  # label of a column -> facts of the process, steps


def run_round(args: argparse.Namespace, row: Row, files: dict[str, list[Path]], place: int) -> Said:
    """Every side in a process of its own, step by step in turn."""
    with contextlib.ExitStack() as stack:
        workers = {}
        flags = ("--method", row.method, "--dropout", str(row.dropout))
        for side in dict.fromkeys(column.side for column in row.columns):
            worker = Worker(side, args.work, args.threads, *flags, script="bench_finetune_worker.py")
            workers[side] = stack.enter_context(contextlib.closing(worker))
        said: Said = {c.label: {"facts": workers[c.side].facts, "steps": []} for c in row.columns}
        turns = row.columns[place % len(row.columns) :] + row.columns[: place % len(row.columns)]
        for i in range(args.steps + 1):
            for column in turns:
                said[column.label]["steps"].append(
                    workers[column.side].ask(batch=str(files[column.texts][i]))
                )
    return said


def judge(row: Row, rounds: list[Said]) -> dict[str, Any]:
    """Figures of each round and ratios; the first step of a process does not count, it compiles."""

    def each(what: Any) -> dict[str, list[float]]:
        return {c.label: [what(said[c.label]["steps"]) for said in rounds] for c in row.columns}

    out: dict[str, Any] = {
        "title": row.title,
        "seconds": each(lambda steps: statistics.median(x["seconds"] for x in steps[1:])),
        "processor_s": each(lambda steps: statistics.median(x["processor_s"] for x in steps[1:])),
        "tokens_per_s": each(
            lambda steps: sum(x["tokens"] for x in steps[1:]) / sum(x["seconds"] for x in steps[1:])
        ),
        "peak_mib": each(lambda steps: max(x["peak_mib"] for x in steps)),
        "losses": {c.label: [x["loss"] for x in rounds[0][c.label]["steps"]] for c in row.columns},
        "about": {c.label: rounds[0][c.label]["facts"] for c in row.columns},
    }
    first, *others = (c.label for c in row.columns)
    for key in ("seconds", "tokens_per_s", "peak_mib"):
        mine = out[key][first]
        out[f"{key}_ratio"] = {
            label: [a / b for a, b in zip(mine, out[key][label], strict=True)] for label in others
        }
    if row.compared:
        mine, theirs = out["losses"][first], out["losses"][others[0]]
        out["loss_difference"] = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    return out


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached and what was."""
    out = []

    def add(what: str, value: float, bound: float, at_most: bool = True) -> None:
        passed = value <= bound if at_most else value >= bound
        out.append({"what": what, "value": value, "bound": bound, "at_most": at_most, "passed": passed})

    for key in ("full", "lora", "lora_dropout"):
        if key in found:
            for what, name, bound in (("time of a step", "seconds", 1.0), ("peak memory", "peak_mib", 1.1)):
                add(
                    f"{key}: {what}, ours / theirs",
                    statistics.median(found[key][f"{name}_ratio"]["theirs"]),
                    bound,
                )
        if "loss_difference" in found.get(key, {}):
            add(f"{key}: greatest difference of a loss", found[key]["loss_difference"], AGREE)
    for key in ("short", "short_lora"):
        for label, ratios in found.get(key, {}).get("tokens_per_s_ratio", {}).items():
            add(f"{key}: tokens/s, ours packed / {label}", statistics.median(ratios), 2.0, at_most=False)
    return out


def text_of(result: dict[str, Any]) -> str:
    """Tables for a terminal and for a page."""
    lines = [
        "| row | column | s per step | tokens/s | peak GiB | first / this: time | tokens/s | peak |",
        "|" + "---|" * 8,
    ]
    for found in result["rows"].values():
        for label, seconds in found["seconds"].items():
            cells = [found["title"], label, spread(seconds), spread(found["tokens_per_s"][label])]
            cells.append(spread([x / 1024 for x in found["peak_mib"][label]]))
            for key in ("seconds_ratio", "tokens_per_s_ratio", "peak_mib_ratio"):
                cells.append(spread(found[key][label]) if label in found[key] else "")
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
            row, steps = ROWS[key], args.steps + 1
            files = {
                c.texts: make_batches(args.work, c.texts, args.batch, args.length, steps) for c in row.columns
            }
            count = min(args.rounds, row.rounds)
            found[key] = judge(row, [run_round(args, row, files, place) for place in range(count)])
            progress(f"{key}: {json.dumps(found[key]['seconds_ratio'])}")
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
