"""One contender of bench.py: loads a model, then answers commands on standard input with JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BLOCK = 16
LONGEST = 8192 + 256  # tokens of our cache
READ = 5 << 28  # bytes of one pass of the bandwidth measurement, 1.25 GiB
WARM = 2  # steps before the measured ones: the others' turn has emptied the caches of the processor
CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")
CHUNK = 512  # tokens of a prompt in one pass: the engine's default, and llama.cpp's


class Model(Protocol):
    """What is measured."""

    def describe(self) -> dict[str, Any]:
        """Versions and instruction sets."""

    def settings(self) -> list[dict[str, bool]]:
        """Switches of which the better one is to be found; empty: none."""

    def set(self, **switches: bool) -> None:
        """Set the switches."""

    def weight_bytes(self) -> int:
        """Bytes of weights read in one pass."""

    def first_token(self, prompt: list[int]) -> int:
        """The first token after a prompt."""

    def prefill(self, tokens: int) -> float:
        """Seconds of a pass over a prompt from an empty cache, logits of its last token."""

    def prepare(self, sequences: int, context: int) -> None:
        """Fill the cache of so many sequences with so many tokens each."""

    def step(self, sequences: int, position: int) -> None:
        """One pass over one token of every sequence, logits of all; the cache grows."""

    def rest(self) -> None:
        """Give back what a long context took."""


class Plain:
    """A contender without switches."""

    def settings(self) -> list[dict[str, bool]]:
        """None."""
        return []

    def set(self, **switches: bool) -> None:
        """Nothing to set."""


class Ours(Plain):
    """The engine; passes are measured at model.runtime.Runtime.forward."""

    def __init__(self, folder: Path, threads: int, backend: str):
        os.environ.setdefault("GLOG_v", "3")
        from research.qwen.engine import Engine

        blocks = LONGEST // BLOCK
        self.engine = Engine.from_pretrained(folder, backend=backend, num_blocks=blocks, threads=threads)
        self.lm: Any = self.engine.lm
        self.filled = False

    def describe(self) -> dict[str, Any]:
        """Versions and the kernels' instruction set."""
        import mindspore

        kernels = self.lm.kernels
        return {"version": f"MindSpore {mindspore.__version__}", "isa": str(getattr(kernels, "isa", ""))}

    def weight_bytes(self) -> int:
        """All parameters but caches and the embedding table."""
        sizes = {p.name: p.nbytes for p in self.lm.model.get_parameters()}
        return sum(size for name, size in sizes.items() if "wte" not in name and not name.endswith(CACHES))

    def first_token(self, prompt: list[int]) -> int:
        """Through the engine, as a user gets it."""
        from research.qwen.decode.params import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
        return int(next(iter(self.engine.stream(prompt, params))).ids[0])

    def prefill(self, tokens: int) -> float:
        """In pieces, as the engine reads a prompt."""
        from research.qwen.decode.loop import Chunk

        blocks, alpha = range(-(-tokens // BLOCK)), self.lm.rope_alpha(tokens)
        begin = time.perf_counter()
        for start in range(0, tokens, CHUNK):
            end = min(start + CHUNK, tokens)
            ids = [p % 997 for p in range(start, end)]
            self.lm.forward([Chunk(ids, start, blocks, alpha, int(end == tokens))])
        return time.perf_counter() - begin

    def prepare(self, sequences: int, context: int) -> None:
        """Random keys and values in every block; sequences share none."""
        if not self.filled:
            fill_caches(self.lm.model)
            self.filled = True
        self.each = self.lm.num_blocks // sequences
        self.alpha = self.lm.rope_alpha(context)

    def step(self, sequences: int, position: int) -> None:
        """One graph call."""
        from research.qwen.decode.loop import Chunk

        tables = [range(s * self.each, (s + 1) * self.each) for s in range(sequences)]
        self.lm.forward([Chunk([100 + s], position, t, self.alpha, 1) for s, t in enumerate(tables)])

    def rest(self) -> None:
        """The cache is one and stays."""


def fill_caches(model: Any) -> None:
    """Normal random numbers in the whole KV cache, written in place."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(1 << 16, np.float32)
    for parameter in model.get_parameters():
        if parameter.name.endswith(CACHES[:2]):
            array = parameter.asnumpy()
            kinds: dict[int, NDArray[Any]] = {
                4: normal,
                2: (normal.view(np.uint32) >> 16).astype(np.uint16),
                1: (normal * 30).astype(np.int8),
            }
            values = kinds[array.itemsize]
            raw = array.reshape(-1).view(values.dtype)
            raw[:] = np.resize(values, raw.size)
            again = parameter.asnumpy().reshape(-1).view(values.dtype)
            if not np.array_equal(again[:4096], values[:4096]):
                raise SystemExit(f"error: {parameter.name} is a copy, the cache cannot be filled")


class Transformers(Plain):
    """Qwen2ForCausalLM in bfloat16 with its dynamic cache, on the exported checkpoint."""

    def __init__(self, folder: Path, threads: int):
        import torch
        from transformers import Qwen2ForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
        self.cache: Any = None

    def describe(self) -> dict[str, Any]:
        """Versions."""
        import transformers

        return {"version": f"transformers {transformers.__version__}, torch {self.torch.__version__}"}

    def weight_bytes(self) -> int:
        """All parameters but the embedding table."""
        return sum(p.nbytes for name, p in self.model.named_parameters() if "embed_tokens" not in name)

    def _forward(self, ids: Any, cache: Any) -> Any:
        with self.torch.inference_mode():
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits

    def first_token(self, prompt: list[int]) -> int:
        """One pass."""
        return int(self._forward(self.torch.tensor([prompt]), None)[0, -1].argmax())

    def prefill(self, tokens: int) -> float:
        """A whole prompt in one pass."""
        self.cache = None
        begin = time.perf_counter()
        self._forward(self.torch.arange(tokens)[None] % 997, None)
        return time.perf_counter() - begin

    def prepare(self, sequences: int, context: int) -> None:
        """A cache of random keys and values."""
        from transformers import DynamicCache

        config = self.model.config
        self.cache = DynamicCache(config=config)
        shape = (
            sequences,
            config.num_key_value_heads,
            context,
            config.hidden_size // config.num_attention_heads,
        )
        for layer in range(config.num_hidden_layers):
            key, value = self.torch.randn((2, *shape), dtype=self.torch.bfloat16)
            self.cache.update(key.contiguous(), value.contiguous(), layer)

    def step(self, sequences: int, position: int) -> None:
        """One call."""
        self._forward(self.torch.arange(100, 100 + sequences)[:, None], self.cache)

    def rest(self) -> None:
        """Drop the cache."""
        self.cache = None


def decode(model: Model, command: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the median step; fewer steps where they are slow."""
    sequences, context = command["sequences"], command["context"]
    model.prepare(sequences, context)
    spent: list[float] = []
    while len(spent) < command["steps"] + WARM and (
        sum(spent) < command["budget_s"] or len(spent) < 3 + WARM
    ):
        begin = time.perf_counter()
        model.step(sequences, context + len(spent))
        spent.append(time.perf_counter() - begin)
    if context > 1024:
        model.rest()
    return {"seconds": statistics.median(spent[WARM:]), "tokens": sequences, "steps": len(spent) - WARM}


def prefill(model: Model, command: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a prompt; short ones twice, of which the quicker one counts."""
    tokens = command["tokens"]
    model.prefill(min(tokens, 64))
    seconds = min(model.prefill(tokens) for _ in range(1 if "once" in command or tokens > CHUNK else 2))
    return {"seconds": seconds, "tokens": tokens}


def read_bandwidth(threads: int) -> None:
    """Answer every command with the bytes per second of plain reading, median of five passes."""
    from research.qwen.kernels.build import library_path
    from research.qwen.kernels.native import NativeLibrary

    native, memory = NativeLibrary(library_path()), np.ones(READ // 4, np.float32)
    native.set_threads(threads)
    say(ready=True)
    for _ in sys.stdin:
        spent = []
        for _ in range(5):
            begin = time.perf_counter()
            native.read_memory(memory)
            spent.append(time.perf_counter() - begin)
        say(bytes_per_s=READ / statistics.median(spent))


def say(**value: Any) -> None:
    """One JSON line."""
    print(json.dumps(value), flush=True)


def memory() -> dict[str, float]:
    """Peak resident memory, and what of the present one is not a mapped file, in MiB."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "peak_mib": int(rows["VmHWM"].split()[0]) / 1024,
        "anonymous_mib": int(rows["RssAnon"].split()[0]) / 1024,
    }


def load(kind: str, path: Path, threads: int, repack: bool) -> Model:
    """The contender."""
    if kind == "llama":
        from scripts.bench_llama import LlamaCpp

        return LlamaCpp(path, threads, repack)  # type: ignore[return-value]
    return Transformers(path, threads) if kind == "transformers" else Ours(path, threads, kind)


def die_with_parent() -> None:
    """A stopped process does not see its input close: have the system end it with the benchmark (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Load, then answer until standard input closes."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", help="cpu, reference, llama, transformers or read")
    parser.add_argument("path", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--no-repack", action="store_true")
    args = parser.parse_args()
    if args.kind == "read":
        return read_bandwidth(args.threads)
    begin = time.perf_counter()
    model = load(args.kind, args.path, args.threads, not args.no_repack)
    loaded = time.perf_counter()
    model.first_token(list(range(16)))
    facts = {"load_s": loaded - begin, "weight_bytes": model.weight_bytes(), "settings": model.settings()}
    say(**facts, **model.describe(), **memory())
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        command = json.loads(line)
        model.set(**command.get("setting") or {})
        answer = (decode if command["do"] == "decode" else prefill)(model, command)
        say(**answer, **memory())
    return None


if __name__ == "__main__":
    main()
