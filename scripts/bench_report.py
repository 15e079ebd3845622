"""Figures of bench.py as tables (terminal, markdown), JSON and a chart."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench_rows import CONTENDERS, ROWS

Table = list[list[str]]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "load_average_at_end": round(os.getloadavg()[2], 2),
    }


def write_report(result: dict[str, Any], output: Path | None) -> None:
    """Print the tables; with ``output`` also write OUTPUT.json, .md and .png."""
    print(text_of(result))
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(markdown_of(result), encoding="utf-8")
    try:
        from scripts.bench_chart import draw

        draw(result, output.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no chart")


def header_of(result: dict[str, Any]) -> str:
    """One line: shape, machine, date, bandwidth."""
    about, shape = result["machine"], result["shape"]
    read = result["read_bytes_per_s"]
    speed = f"{statistics.median(read) / 1e9:.1f} GB/s ({min(read) / 1e9:.1f}-{max(read) / 1e9:.1f})"
    return (
        f"Shape {shape['size']} ({shape['layers']} layers of {shape['hidden']}), random weights; {about['cpu']}, "
        f"{result['threads']} threads, {about['memory_gib']} GiB, {result['date']}; plain reading {speed}; "
        f"medians of up to {result['rounds']} rounds."
    )


def speed_table(result: dict[str, Any]) -> Table:
    """Rows x contenders, tokens a second, and the share of the bandwidth limit behind it."""
    names = list(result["contenders"])
    table = [["tokens/s (share of the bandwidth limit)", *(CONTENDERS[name].title for name in names)]]
    for row, values in result["tokens_per_s"].items():
        cells = []
        for name in names:
            cell = "-"
            if values.get(name):
                cell = figure(statistics.median(values[name].values()))
                share = result["share_of_bandwidth"].get(row, {}).get(name)
                cell += f" ({100 * statistics.median(share.values()):.0f} %)" if share else ""
            cells.append(cell)
        table.append([ROWS[row].title, *cells])
    return table


def start_table(result: dict[str, Any]) -> Table:
    """Loading, first token and memory."""
    names = list(result["contenders"])
    wanted: list[tuple[str, Callable[[dict[str, list[float]]], float]]] = [
        ("load, s", lambda facts: statistics.median(facts["load_s"])),
        ("process start to first token, s", lambda facts: statistics.median(facts["first_token_s"])),
        ("peak memory at the first token, GiB", lambda facts: statistics.median(facts["peak_mib"]) / 1024),
        ("of that not mapped files, GiB", lambda facts: statistics.median(facts["anonymous_mib"]) / 1024),
        (
            "peak memory of all rows, GiB",
            lambda facts: max(max(v) for k, v in facts.items() if "peak" in k) / 1024,
        ),
    ]
    table = [["start", *(CONTENDERS[name].title for name in names)]]
    for title, value in wanted:
        table.append([title, *(f"{value(result['start'][name]):.2f}" for name in names)])
    return table


def target_table(result: dict[str, Any]) -> Table:
    """What was to be reached and what was."""
    table = [["target", "against", "at least", "measured", "least - greatest", "rounds", ""]]
    for target in result["targets"]:
        low, high = target["range"]
        cells = [f"{target['what']}, {target['ours']}", target["against"], f"{target['least']:g} x"]
        cells += [f"{target['ratio']:.2f} x", f"{low:.2f} - {high:.2f}", str(target["rounds"])]
        table.append([*cells, "pass" if target["passed"] else "FAIL"])
    return table


def remarks(result: dict[str, Any]) -> list[str]:
    """Versions, switches and what could not be measured."""
    lines = list(result["notes"])
    for version in dict.fromkeys(about["version"] for about in result["contenders"].values()):
        lines.append(version)
    systems = {about["system"] for about in result["contenders"].values() if "system" in about}
    lines += [f"llama.cpp: {text}" for text in systems]
    for name, rows in result["settings"].items():
        parts = []
        for row, switches in rows.items():
            on = " ".join(f"{key} {'on' if value else 'off'}" for key, value in switches.items())
            parts.append(f"{row}: {on}")
        lines.append(f"{name}, the better switches: {'; '.join(parts)}")
    return lines


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tables(result: dict[str, Any]) -> list[Table]:
    """All of them, without empty ones."""
    return [
        table for table in (target_table(result), speed_table(result), start_table(result)) if len(table) > 1
    ]


def text_of(result: dict[str, Any]) -> str:
    """For a terminal."""
    parts = [header_of(result)]
    for table in tables(result):
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table
        ]
        parts.append("\n".join(line.rstrip() for line in lines))
    parts.append("\n".join(remarks(result)))
    return "\n\n".join(parts)


def markdown_of(result: dict[str, Any]) -> str:
    """For a README."""
    parts = [header_of(result)]
    for table in tables(result):
        lines = ["| " + " | ".join(row) + " |" for row in table]
        lines.insert(1, "|" + "---|" * len(table[0]))
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {line}" for line in remarks(result)))
    return "\n\n".join(parts) + "\n"
