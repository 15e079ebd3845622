"""Cost of constrained decoding per token on the published vocabulary: prints JSON, milliseconds.

python scripts/bench_constraints.py [--vocab-file qwen.tiktoken] [--rows 151936] [--tokens 200] [--seed 0]

Each grammar is run along a realistic answer, and along tokens drawn evenly from what it allows, which visits states
that no sensible answer reaches. ``processor`` is what a row of logits costs more with the constraint: following the
last token, the mask, and banning. A row of plain sampling is given beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from research.qwen.decode.constraints import Constraint, ConstraintCompiler  # noqa: E402
from research.qwen.decode.params import SamplingParams  # noqa: E402
from research.qwen.decode.sampling import Sampler  # noqa: E402
from research.qwen.text.tokenizer import QwenTokenizer  # noqa: E402

LIMIT_MS = 2.0  # median of a token, as for plain sampling
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["staff", "guest", "员工"]}, "maxItems": 8},
        "manager": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "manager"],
    "additionalProperties": False,
}
CALL = (
    'start: THOUGHT "\\nAction: " (first | second)\n'
    "THOUGHT: /[^\\n]{0,400}/\n"
    'first: "weather\\nAction Input: " %json {"type": "object", "properties": {"city": {"type": "string"}}, '
    '"required": ["city"], "additionalProperties": false}\n'
    'second: "search\\nAction Input: " %json {"type": "object"}\n'
)
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"enum": [f"value {i} {j}" for j in range(20)]} for i in range(100)},
}

Grammar = tuple[Callable[[ConstraintCompiler], Constraint], str]
GRAMMARS: dict[str, Grammar] = {
    "json_object": (
        lambda c: c.json_object(),
        '{"city": "北京", "temperature": 21.5, "text": "a sunny day 😀", "list": [1, {"a": null}, true]}',
    ),
    "json_schema": (
        lambda c: c.json_schema(PERSON),
        '{"name": "Ada 张", "age": 36, "born": "1815-12-10", "tags": ["staff", "员工"], '
        '"manager": {"name": "B", "age": 50, "manager": null}}',
    ),
    "json_schema_100_fields": (
        lambda c: c.json_schema(WIDE),
        '{"field_3": "value 3 7", "field_50": "value 50 19", "field_99": "value 99 0"}',
    ),
    "regex": (lambda c: c.regex(r"(\+\d{1,3} )?\d{3}-\d{4}( ext\. [a-z0-9]+)?"), "+86 555-1234 ext. a1b2"),
    "choice": (lambda c: c.choice(["positive", "negative", "neutral", "中性"]), "neutral"),
    "tool_call": (lambda c: c.lark(CALL), ' I need it.\nAction: weather\nAction Input: {"city": "北京"}'),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-file", help="qwen.tiktoken; found as everywhere if not given")
    parser.add_argument("--rows", type=int, default=151_936, help="columns of the logits")
    parser.add_argument(
        "--tokens", type=int, default=200, help="random tokens per grammar, over several answers"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def along_text(constraint: Constraint, ids: list[int], rows: int) -> list[float]:
    """Milliseconds of the processor at each token of an answer, and at its end."""
    (processor,) = constraint()
    seen, times = [0], []
    for token in ids:
        times.append(_timed(processor, seen, np.zeros(rows)))
        seen.append(token)
    return times


def along_random(constraint: Constraint, ends: set[int], rows: int, tokens: int, seed: int) -> list[float]:
    """Milliseconds at each of ``tokens`` tokens drawn evenly from what is allowed; at an end it begins anew."""
    rng, times = np.random.default_rng(seed), list[float]()
    (processor,), seen = constraint(), [0]
    while len(times) < tokens:
        scores = np.zeros(rows)
        times.append(_timed(processor, seen, scores))
        seen.append(int(rng.choice(np.flatnonzero(scores == 0))))
        if seen[-1] in ends:
            (processor,), seen = constraint(), [0]
    return times


def plain_ms(rows: int, seed: int) -> float:
    """Median of a row of plain sampling with top-p 0.8."""
    logits = np.random.default_rng(seed).normal(scale=3.0, size=rows).astype(np.float32)
    sampler, times = Sampler(SamplingParams(top_p=0.8, seed=seed), [0]), []
    for _ in range(50):
        start = time.perf_counter()
        sampler.next(logits, [0])
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def measure(
    grammar: Grammar, compiler: ConstraintCompiler, tokenizer: QwenTokenizer, args: argparse.Namespace
) -> dict[str, object]:
    """One grammar: time to compile, and the processor's time along both kinds of answers."""
    start = time.perf_counter()
    constraint = grammar[0](compiler)
    compiled = 1e3 * (time.perf_counter() - start)
    ids = [*tokenizer.encode(grammar[1]), tokenizer.im_end_id]
    return {
        "compile_ms": round(compiled, 2),
        "answer": _summary(along_text(constraint, ids, args.rows)),
        "random": _summary(
            along_random(
                constraint, {tokenizer.im_end_id, tokenizer.eod_id}, args.rows, args.tokens, args.seed
            )
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Run every grammar; exit code 1 if the median of one is above the limit."""
    args = build_parser().parse_args(argv)
    tokenizer = QwenTokenizer(args.vocab_file)
    start = time.perf_counter()
    compiler = ConstraintCompiler(tokenizer, args.rows, [tokenizer.eod_id, tokenizer.im_end_id])
    compiler.warm()
    report: dict[str, object] = {
        "rows": args.rows,
        "limit_ms": LIMIT_MS,
        "vocabulary_ms": round(1e3 * (time.perf_counter() - start), 1),
        "plain_sampling_ms": round(plain_ms(args.rows, args.seed), 3),
    }
    results = {name: measure(grammar, compiler, tokenizer, args) for name, grammar in GRAMMARS.items()}
    print(json.dumps({**report, "processor": results}, indent=2))
    medians = [result[kind]["median_ms"] for result in results.values() for kind in ("answer", "random")]  # type: ignore[index]
    return int(max(medians) > LIMIT_MS)


def _timed(processor: Callable[..., object], seen: list[int], scores: np.ndarray) -> float:
    start = time.perf_counter()
    processor(seen, scores)
    return 1e3 * (time.perf_counter() - start)


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "tokens": len(times),
        "median_ms": round(float(np.median(times)), 3),
        "p99_ms": round(float(np.quantile(times, 0.99)), 3),
        "max_ms": round(max(times), 3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
