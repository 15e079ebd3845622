"""Speed of the cpu kernels beside a plain read of memory, MindSpore's MatMul and (if installed) torch; JSON on stdout.

    python scripts/bench_kernels.py [--threads 2] [--seconds 1.0] [--only gemv|gemm|quant]

Contenders of one case take turns, so that a busy machine slows all of them alike; the best and the median are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from research.qwen.kernels.build import library_path
from research.qwen.kernels.native import NativeLibrary
from research.qwen.quant.schemes import Scheme, packed_shapes

GEMV = ((2048, 2048), (6144, 2048), (5504, 2048), (2048, 5504), (151936, 2048))
GEMM = ((5504, 2048), (2048, 5504))
QUANT = ((6144, 2048), (2048, 2048), (5504, 2048), (2048, 5504), (151936, 2048))
STREAM_BYTES = 1 << 30  # weights are rotated through this much memory, more than a cache can keep
SUFFIX = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Run = Callable[[], object]


def race(contenders: dict[str, Run], seconds: float) -> dict[str, dict[str, float]]:
    """Best and median seconds of each contender, taking turns until the time is used up (at least 5 rounds)."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: {"best": min(t), "median": float(np.median(t))} for name, t in times.items()}


def weights(n: int, k: int, fmt: str, copies: int) -> np.ndarray:
    """(copies, n, k) ordinary numbers in a storage format."""
    values = np.random.default_rng(0).standard_normal((1, n, k)).astype(np.float32)
    if fmt == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.repeat(values.astype(np.float16) if fmt == "float16" else values, copies, axis=0)


def linear(native: NativeLibrary, x: np.ndarray, w: np.ndarray, fmt: str) -> Run:
    """One call of our kernel; successive calls take successive copies of the weights."""
    y = np.empty((len(x), w.shape[1]), np.float32)
    calls = itertools.cycle([native.bind(f"QwenLinear{SUFFIX[fmt]}", [x, copy], y) for copy in w])
    return lambda: next(calls)()


def others(x: np.ndarray, w: np.ndarray, fmt: str, threads: int) -> dict[str, Run]:
    """The same product by MindSpore (float32 only) and torch."""
    found: dict[str, Run] = {}
    if fmt == "float32":
        import mindspore as ms
        from mindspore import Tensor, ops

        ms.set_device("CPU")
        matmul = ops.MatMul(transpose_b=True)
        left, rights = Tensor.from_numpy(x), itertools.cycle([Tensor.from_numpy(copy) for copy in w])
        found["mindspore"] = lambda: matmul(left, next(rights)).asnumpy()
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(copy.view(np.int16) if fmt == "bfloat16" else copy) for copy in w]
    tensors = [t.view(torch.bfloat16) for t in tensors] if fmt == "bfloat16" else tensors
    left_torch, cycle = torch.from_numpy(x).to(tensors[0].dtype), itertools.cycle(tensors)
    found["torch"] = lambda: torch.nn.functional.linear(left_torch, next(cycle))
    return found


def bench_gemv(native: NativeLibrary, threads: int, seconds: float) -> list[dict[str, Any]]:
    """One row of x: GB/s of weights read, beside a plain read of memory."""
    memory = np.ones(STREAM_BYTES // 4, np.float32)
    report = []
    for (n, k), fmt in itertools.product(GEMV, SUFFIX):
        size = n * k * (4 if fmt == "float32" else 2)
        w = weights(n, k, fmt, -(-STREAM_BYTES // size))
        x = np.random.default_rng(1).standard_normal((1, k)).astype(np.float32)
        part = memory[: max(size // 4, 1 << 22)]
        starts = itertools.cycle(range(0, memory.size - part.size + 1, part.size))

        def read(part: np.ndarray = part, starts: Any = starts) -> None:
            first = next(starts)
            native.read_memory(memory[first : first + part.size])

        times = race({"read": read, "ours": linear(native, x, w, fmt), **others(x, w, fmt, threads)}, seconds)
        rates = {
            name: {
                key: round((part.nbytes if name == "read" else size) / t / 1e9, 2) for key, t in spent.items()
            }
            for name, spent in times.items()
        }
        share = {key: round(rates["ours"][key] / rates["read"][key], 3) for key in ("best", "median")}
        report.append({"shape": [n, k], "storage": fmt, "gigabytes_per_s": rates, "ours_of_read": share})
    return report


def bench_gemm(native: NativeLibrary, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Many rows of x: GFLOP/s."""
    report = []
    for (n, k), rows, fmt in itertools.product(GEMM, (4, 8, 16, 128, 512), ("float32", "bfloat16")):
        w = weights(n, k, fmt, 4)
        x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
        times = race({"ours": linear(native, x, w, fmt), **others(x, w, fmt, threads)}, seconds)
        rates = {
            name: {key: round(2 * rows * n * k / t / 1e9, 1) for key, t in spent.items()}
            for name, spent in times.items()
        }
        report.append({"shape": [n, k], "rows": rows, "storage": fmt, "gigaflop_per_s": rates})
    return report


def packed(text: str, n: int, k: int, copies: int) -> list[list[np.ndarray]]:
    """Random integer matrices as the kernels take them: weight, scales, zeros, order, n k bits group."""
    scheme = Scheme.parse(text)
    rng, nothing = np.random.default_rng(3), np.empty(0, np.float32)
    shapes = packed_shapes(scheme, n, k)
    first = {
        "weight": rng.integers(0, 256, shapes["weight"][0], np.uint8),
        "scales": np.full(*shapes["scales"][:1], 0.01, shapes["scales"][1]),
        "zeros": rng.integers(0, scheme.top, shapes["zeros"][0], np.uint8) if scheme.zeros else nothing,
    }
    about = np.array([n, k, scheme.bits, scheme.group], np.int64)
    return [[*(array.copy() for array in first.values()), nothing, about] for _ in range(copies)]


def bench_quant(native: NativeLibrary, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Integer weights: GB/s of weights beside a plain read of memory, and 10^12 integer operations a second."""
    memory, nothing = np.ones(STREAM_BYTES // 4, np.float32), np.empty(0, np.float32)
    names = {"integer": "QwenTestQuantLinear", "float": "QwenTestFloatLinear"}
    report = []
    cases = [
        *itertools.product(QUANT, ("int4", "int8"), (1, 8, 16)),
        *itertools.product(QUANT[:4], ("int4", "int8"), (512,)),
    ]
    for (n, k), text, rows in cases:
        size = sum(array.nbytes for array in packed(text, n, k, 1)[0][:2])
        matrices = packed(text, n, k, -(-STREAM_BYTES // size) if rows < 512 else 4)
        x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
        y = np.empty((rows, n), np.float32)
        contenders: dict[str, Run] = {"read": lambda: native.read_memory(memory)}
        for kind in names if rows == 1 else ("integer",):
            calls = itertools.cycle(
                [native.bind(names[kind], [x, *m, nothing, nothing], y) for m in matrices]
            )
            contenders[kind] = _in_turn(calls)
        times = race(contenders, seconds)
        report.append(
            {
                "shape": [n, k],
                "scheme": text,
                "rows": rows,
                "gigabytes_per_s": {
                    name: _rates((memory.nbytes if name == "read" else size) / 1e9, spent)
                    for name, spent in times.items()
                },
                "tera_operations_per_s": _rates(2e-12 * rows * n * k, times["integer"]),
            }
        )
    return report


def _in_turn(calls: Iterator[Run]) -> Run:
    return lambda: next(calls)()


def _rates(amount: float, spent: dict[str, float]) -> dict[str, float]:
    return {key: round(amount / seconds, 3) for key, seconds in spent.items()}


BENCHES = {"gemv": bench_gemv, "gemm": bench_gemm, "quant": bench_quant}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Speed of the cpu kernels as JSON.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each contender of each case")
    parser.add_argument("--only", choices=sorted(BENCHES))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the report."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("GLOG_v", "3")
    native = NativeLibrary(library_path())
    native.set_threads(args.threads)
    report: dict[str, Any] = {"isa": native.isa, "threads": native.threads, "load_before": os.getloadavg()[0]}
    for name, bench in BENCHES.items():
        if args.only in (None, name):
            report[name] = bench(native, args.threads, args.seconds)
    report["load_after"] = os.getloadavg()[0]
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
