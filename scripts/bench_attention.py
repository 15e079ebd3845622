"""Speed of paged attention on cpu in every cache format, beside a plain read of memory; JSON on stdout.

    python scripts/bench_attention.py [--threads 2] [--rounds 7] [--only decode|prefill] [--context 4096]

Decode: one new token of the 1.8B shape (16 heads of 128) in each of several layers, so that no layer finds its cache
in the processor; GB/s of keys and values read, and the same run's plain read. Prefill: GFLOP/s of the two products
(causal, so half of the square). Contenders take turns; best and median are given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from research.qwen.kernels.build import library_path
from research.qwen.kernels.kv_layout import STORED, SUFFIX, cache_arrays
from research.qwen.kernels.native import NativeLibrary

HEADS, DIM, BLOCK = 16, 128, 16
READ_FLOATS = 1 << 26
Run = Callable[[], object]


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin with a page, as the backend's caches do."""
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 4096, np.uint8)
    first = -raw.ctypes.data % 4096
    return raw[first : first + raw.nbytes - 4096].view(dtype).reshape(shape)


def filled_cache(fmt: str, blocks: int, seed: int) -> list[np.ndarray]:
    """A cache of ordinary numbers."""
    rng = np.random.default_rng(seed)
    arrays = []
    for name, (shape, dtype) in cache_arrays(fmt, blocks, BLOCK, HEADS, DIM).items():
        array = aligned(shape, dtype)
        piece = rng.standard_normal(1 << 16, dtype=np.float32)
        if name.endswith("scales"):
            array[...] = 0.01
        else:
            kept = {np.float32: piece, np.uint16: (piece.view(np.uint32) >> 16), np.int8: piece * 30}[dtype]
            array.reshape(-1)[...] = np.resize(kept.astype(dtype), array.size)
        arrays.append(array)
    return arrays


def call(native: NativeLibrary, fmt: str, cache: list[np.ndarray], start: int, length: int) -> Run:
    """One run of tokens of one sequence whose blocks lie scattered."""
    rng = np.random.default_rng(1)
    blocks = rng.permutation(cache[0].shape[0]).astype(np.int32)
    position = np.arange(start, start + length)
    inputs = [
        rng.standard_normal((length, 3 * HEADS * DIM), dtype=np.float32),
        *rng.standard_normal((2, length, DIM // 2), dtype=np.float32),
        np.ones(length, np.float32),
        (blocks[position // BLOCK] * BLOCK + position % BLOCK).astype(np.int32),
        blocks[None],
        np.array([length], np.int32),
        np.array([start + length], np.int32),
    ]
    y = np.empty((length, HEADS * DIM), np.float32)
    return native.bind(f"QwenAttention{SUFFIX[fmt]}", [*inputs, *cache], y)


def race(contenders: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Best and median seconds of each contender, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - began)
    return {name: {"best": min(t), "median": float(np.median(t))} for name, t in times.items()}


def bench_decode(native: NativeLibrary, context: int, rounds: int, layers: int) -> dict[str, Any]:
    """One token at ``context``: every format in turn with a plain read, each over several layers' caches."""
    blocks = -(-(context + 1) // BLOCK)
    memory = np.ones(READ_FLOATS, np.float32)
    contenders: dict[str, Run] = {"read": lambda: native.read_memory(memory)}
    sizes = {"read": memory.nbytes}
    for fmt in STORED:
        caches = [filled_cache(fmt, blocks, i) for i in range(layers)]
        calls = [call(native, fmt, cache, context, 1) for cache in caches]

        def run(calls: list[Run] = calls) -> None:
            for one in calls:
                one()

        contenders[fmt] = run
        number = np.dtype(STORED[fmt]).itemsize
        per_token = 2 * HEADS * (DIM * number + (4 if fmt == "int8" else 0))
        sizes[fmt] = layers * (context + 1) * per_token
    times = race(contenders, rounds)
    report: dict[str, Any] = {"context": context, "layers": layers}
    for name, spent in times.items():
        rates = {key: round(sizes[name] / t / 1e9, 2) for key, t in spent.items()}
        report[name] = {"gigabytes_per_s": rates}
        if name != "read":
            report[name]["microseconds_a_layer"] = {k: round(t / layers * 1e6, 1) for k, t in spent.items()}
            report[name]["of_read"] = round(rates["median"] / report["read"]["gigabytes_per_s"]["median"], 3)
    return report


def bench_prefill(native: NativeLibrary, start: int, length: int, rounds: int) -> dict[str, Any]:
    """A chunk of ``length`` tokens behind ``start`` cached ones."""
    blocks = -(-(start + length) // BLOCK)
    contenders = {fmt: call(native, fmt, filled_cache(fmt, blocks, 0), start, length) for fmt in STORED}
    flops = 4 * HEADS * DIM * sum(range(start + 1, start + length + 1))
    report: dict[str, Any] = {"start": start, "new_tokens": length}
    for name, spent in race(contenders, rounds).items():
        report[name] = {
            "gigaflop_per_s": {key: round(flops / t / 1e9, 1) for key, t in spent.items()},
            "milliseconds_a_layer": {key: round(t * 1e3, 3) for key, t in spent.items()},
        }
    return report


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Speed of paged attention on cpu as JSON.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6, help="layers of decode, each with its own cache")
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--context", type=int, nargs="+", default=[0, 4096, 8192], help="of decode")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the report."""
    args = build_parser().parse_args(argv)
    native = NativeLibrary(library_path())
    native.set_threads(args.threads)
    report: dict[str, Any] = {"isa": native.isa, "threads": native.threads, "load_before": os.getloadavg()[0]}
    if args.only != "prefill":
        report["decode"] = [bench_decode(native, n, args.rounds, args.layers) for n in args.context]
    if args.only != "decode":
        cases = ((0, 128), (0, 512), (0, 2048), (7680, 512))
        report["prefill"] = [bench_prefill(native, *case, args.rounds) for case in cases]
    report["load_after"] = os.getloadavg()[0]
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
