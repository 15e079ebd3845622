"""What bench.py measures, on whom, and what it must reach."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, dict[str, dict[int, float]]]  # row -> contender -> round -> tokens per second


@dataclass(frozen=True)
class Row:
    """One measurement. ``like``: the row whose better switches it uses; ``peer_rounds``: fewer where it is long."""

    title: str
    command: dict[str, Any]
    like: str
    most_rounds: int = 99

    @property
    def context(self) -> int:
        """Tokens in the cache."""
        return int(self.command.get("context", 0))


def _decode(sequences: int, context: int, steps: int) -> dict[str, Any]:
    return {"do": "decode", "sequences": sequences, "context": context, "steps": steps, "budget_s": 4.0}


def _prefill(tokens: int) -> dict[str, Any]:
    return {"do": "prefill", "tokens": tokens}


SHORT = 16  # tokens in the cache where the context is called empty
ROWS = {
    "decode_1": Row("decode, batch 1", _decode(1, SHORT, 32), "decode_1"),
    "decode_4": Row("decode, batch 4", _decode(4, SHORT, 12), "decode_8"),
    "decode_8": Row("decode, batch 8", _decode(8, SHORT, 8), "decode_8"),
    "decode_16": Row("decode, batch 16", _decode(16, SHORT, 8), "decode_8"),
    "context_4096": Row("decode at context 4096", _decode(1, 4096, 10), "context_4096"),
    "context_8192": Row("decode at context 8192", _decode(1, 8192, 8), "context_4096", 3),
    "prefill_128": Row("prefill 128", _prefill(128), "prefill_512"),
    "prefill_512": Row("prefill 512", _prefill(512), "prefill_512"),
    "prefill_2048": Row("prefill 2048", _prefill(2048), "prefill_512"),
}
QUICK = ("decode_1", "decode_8", "context_4096", "prefill_512")


@dataclass(frozen=True)
class Contender:
    """Who is measured: how the worker is called, what it loads, and with whom it is in memory at the same time."""

    title: str
    kind: str
    file: str
    group: int


CONTENDERS = {
    "int4": Contender("ours, int4", "cpu", "int4", 0),
    "llama-q4_0": Contender("llama.cpp Q4_0", "llama", "q4_0.gguf", 0),
    "transformers": Contender("transformers bf16", "transformers", "qwen2", 0),
    "int8": Contender("ours, int8", "cpu", "int8", 1),
    "llama-q8_0": Contender("llama.cpp Q8_0", "llama", "q8_0.gguf", 1),
    "bf16": Contender("ours, bf16", "cpu", "bfloat16", 2),
    "llama-f16": Contender("llama.cpp F16", "llama", "f16.gguf", 2),
    "reference": Contender("ours, plain operators", "reference", "bfloat16", 3),
}
DEFAULT = tuple(name for name in CONTENDERS if name != "reference")
PEERS = ("llama-q4_0", "llama-q8_0", "llama-f16", "transformers")
BANDWIDTH = "read bandwidth"


@dataclass(frozen=True)
class Target:
    """The best of ``ours`` against the best of ``others`` (or against the bandwidth) in one row."""

    row: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    least: float


TARGETS = (
    Target("decode_1", ("int4",), ("llama-q4_0",), 1.15),
    Target("decode_1", ("int8",), ("llama-q8_0",), 1.3),
    Target("decode_1", ("bf16",), ("llama-f16",), 0.95),
    Target("decode_1", ("int8",), (BANDWIDTH,), 0.8),
    Target("decode_1", ("bf16",), (BANDWIDTH,), 0.8),
    Target("prefill_512", ("int8", "int4"), PEERS, 1.8),
    Target("prefill_2048", ("int8", "int4"), PEERS, 1.8),
    Target("decode_8", ("int4",), ("llama-q4_0",), 1.5),
    Target("decode_16", ("int4",), ("llama-q4_0",), 1.5),
    Target("context_4096", ("int4",), ("llama-q4_0",), 2.0),
    Target("decode_1", ("int4",), ("transformers",), 7.0),
)


def judge(figures: Figures, limits: Figures) -> list[dict[str, Any]]:
    """Every target whose contenders were measured: the median over the rounds of the ratio within a round.

    ``limits`` holds the share of the bandwidth limit in the same places as ``figures``.
    """
    out = []
    for target in TARGETS:
        row = figures.get(target.row, {})
        ours = _best(row, target.ours)
        if target.others == (BANDWIDTH,):
            ratios = list(_best(limits.get(target.row, {}), target.ours).values())
        else:
            others = _best(row, target.others)
            ratios = [ours[i] / others[i] for i in ours if i in others]
        if not ratios:
            continue
        known = (BANDWIDTH,) if target.others == (BANDWIDTH,) else [n for n in target.others if n in row]
        ratio = statistics.median(ratios)
        out.append(
            {
                "what": ROWS[target.row].title,
                "ours": " or ".join(name for name in target.ours if name in row),
                "against": _against(list(known)),
                "least": target.least,
                "ratio": round(ratio, 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "rounds": len(ratios),
                "passed": ratio >= target.least,
            }
        )
    return out


def _against(names: list[str]) -> str:
    titles = [CONTENDERS[name].title if name in CONTENDERS else name for name in names]
    return titles[0] if len(titles) == 1 else "best of " + ", ".join(titles)


def _best(row: dict[str, dict[int, float]], names: Iterable[str]) -> dict[int, float]:
    """Per round the greatest value, in the rounds where all of these contenders that were measured have one."""
    values = [row[name] for name in names if name in row]
    rounds = set.intersection(*(set(v) for v in values)) if values else set()
    return {i: max(v[i] for v in values) for i in sorted(rounds)}
