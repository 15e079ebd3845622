"""The chart of bench.py: a panel for decoding, one for long contexts, one for prompts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from scripts.bench_rows import CONTENDERS, ROWS

PANELS = {
    "decoding, short context": ("decode_1", "decode_4", "decode_8", "decode_16"),
    "decoding, long context": ("context_4096", "context_8192"),
    "reading a prompt": ("prefill_128", "prefill_512", "prefill_2048"),
}
COLOURS = {
    "int4": "#08519c",
    "int8": "#3182bd",
    "bf16": "#6baed6",
    "reference": "#bdd7e7",
    "llama-q4_0": "#a63603",
    "llama-q8_0": "#e6550d",
    "llama-f16": "#fd8d3c",
    "transformers": "#969696",
}


def draw(result: dict[str, Any], file: Path) -> None:
    """Bars of the medians with the range of the rounds; raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in COLOURS if name in result["contenders"]]
    panels = {
        title: [row for row in rows if result["tokens_per_s"].get(row)] for title, rows in PANELS.items()
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, len(panels), width_ratios=[len(rows) for rows in panels.values()], squeeze=False
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        width = 0.85 / len(names)
        for place, name in enumerate(names):
            values = [list(result["tokens_per_s"][row].get(name, {}).values()) or [0.0] for row in rows]
            middle = [statistics.median(v) for v in values]
            error = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            places = [i + (place - (len(names) - 1) / 2) * width for i in range(len(rows))]
            label = CONTENDERS[name].title if axis is axes[0][0] else None
            style = {"color": COLOURS[name], "error_kw": {"linewidth": 0.8}}
            axis.bar(places, middle, width, yerr=error, label=label, **style)
        axis.set_xticks(
            range(len(rows)),
            [ROWS[row].title.replace("decode, ", "").replace("decode at ", "") for row in rows],
        )
        axis.set_title(title)
        axis.set_ylabel("tokens/s")
        axis.grid(axis="y", alpha=0.3)
    about = result["machine"]
    figure.legend(loc="outside lower center", ncols=len(names))
    figure.suptitle(
        f"Qwen {result['shape']['size']} shape, {about['cpu']}, {result['threads']} threads, {result['date']}"
    )
    figure.savefig(file, dpi=110)
