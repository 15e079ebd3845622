"""Time of one sampled token on the real vocabulary size: prints JSON, median milliseconds per configuration.

python scripts/bench_sampling.py [--vocab 151936] [--repeat 100] [--spread 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from research.qwen.decode.params import SamplingParams  # noqa: E402
from research.qwen.decode.sampling import Sampler  # noqa: E402

LIMIT_MS = 2.0
CONFIGURATIONS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(top_p=0.8),
    "top_p_0.99": SamplingParams(top_p=0.99),
    "top_k": SamplingParams(top_k=50),
    "top_k_5000": SamplingParams(top_k=5000),
    "min_p": SamplingParams(min_p=0.05),
    "repetition_penalty": SamplingParams(repetition_penalty=1.1),
    "logprobs": SamplingParams(logprobs=20),
    "greedy_logprobs": SamplingParams(temperature=0, logprobs=20),
    "all": SamplingParams(
        temperature=0.9,
        top_k=200,
        top_p=0.8,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logprobs=20,
    ),
    "top_p_penalties_logprobs": SamplingParams(
        top_p=0.99, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5, logprobs=20
    ),
    "hot_top_p_logprobs": SamplingParams(temperature=5.0, top_p=0.99, logprobs=20),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936, help="logits per row")
    parser.add_argument("--context", type=int, default=8192, help="ids already in the sequence")
    parser.add_argument("--repeat", type=int, default=100, help="tokens per configuration")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the random logits")
    return parser


def median_ms(params: SamplingParams, rows: np.ndarray, context: list[int], repeat: int) -> float:
    """Median time of one token; every token is added to the context as in real decoding."""
    sampler = Sampler(params, context, seed=1)
    ids, times = list(context), []
    for step in range(repeat):
        start = time.perf_counter()
        token, _ = sampler.next(rows[step % len(rows)], ids)
        times.append(1e3 * (time.perf_counter() - start))
        ids.append(token)
    return float(np.median(times))


def main(argv: list[str] | None = None) -> int:
    """Run every configuration; exit code 1 if one is above the limit."""
    args = build_parser().parse_args(argv)
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=args.spread, size=(8, args.vocab)).astype(np.float32)
    context = rng.integers(0, args.vocab, size=args.context).tolist()
    results = {
        name: round(median_ms(params, rows, context, args.repeat), 3)
        for name, params in CONFIGURATIONS.items()
    }
    report = {"vocab": args.vocab, "context": args.context, "spread": args.spread, "limit_ms": LIMIT_MS}
    print(json.dumps({**report, "median_ms": results}, indent=2))
    return int(max(results.values()) > LIMIT_MS)


if __name__ == "__main__":
    raise SystemExit(main())
