"""One contender of bench.py: loads a model, then answers commands on standard input with JSON lines."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Model(Protocol):
    """What is measured."""

    def prefill(self, tokens: int) -> None:
        """One pass over a prompt, logits of its last token."""

    def decode(self, tokens: int) -> None:
        """Greedy tokens one by one after a short prompt; the prompt's pass is not part of it (see ``start``)."""

    def start(self) -> None:
        """The pass over the short prompt before ``decode``."""


class Ours:
    """The engine's runtime, on the cpu or the reference backend."""

    def __init__(self, name: str, folder: Path, threads: int):
        os.environ.setdefault("GLOG_v", "3")
        from research.qwen.model.opening import open_model

        backend = "reference" if name == "reference" else "cpu"
        self.lm = open_model(
            folder, backend=backend, num_blocks=256, threads=threads if backend == "cpu" else None
        ).runtime
        self.last, self.length = 0, 0

    def _forward(self, ids: list[int], start: int) -> int:
        from research.qwen.decode.loop import Chunk

        return int(self.lm.forward([Chunk(ids, start, range(256), 1.0, 1)])[0].argmax())

    def prefill(self, tokens: int) -> None:
        """A whole prompt in one pass."""
        self._forward(list(range(tokens)), 0)

    def start(self) -> None:
        """Sixteen tokens."""
        self.last, self.length = self._forward(list(range(16)), 0), 16

    def decode(self, tokens: int) -> None:
        """Greedy, one graph call a token."""
        for _ in range(tokens):
            self.last = self._forward([self.last], self.length)
            self.length += 1


class Transformers:
    """Qwen2ForCausalLM in float32 with its dynamic cache."""

    def __init__(self, folder: Path, threads: int):
        import torch
        from transformers import Qwen2ForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.last: Any = None
        self.cache: Any = None

    def _forward(self, ids: Any, cache: Any) -> None:
        with self.torch.inference_mode():
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def prefill(self, tokens: int) -> None:
        """A whole prompt in one pass."""
        self._forward(self.torch.arange(tokens)[None], None)

    def start(self) -> None:
        """Sixteen tokens."""
        self._forward(self.torch.arange(16)[None], None)

    def decode(self, tokens: int) -> None:
        """Greedy, one call a token."""
        for _ in range(tokens):
            self._forward(self.last, self.cache)


def timed(model: Model, task: str, tokens: int) -> float:
    """Tokens per second."""
    if task == "decode":
        model.start()
        model.decode(2)  # the other contenders' turn has emptied the caches
    begin = time.perf_counter()
    (model.decode if task == "decode" else model.prefill)(tokens)
    return tokens / (time.perf_counter() - begin)


def say(**value: Any) -> None:
    """One JSON line."""
    print(json.dumps(value), flush=True)


def main() -> None:
    """Load, then answer until standard input closes."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    begin = time.perf_counter()
    model: Model = Transformers(folder, threads) if name == "transformers" else Ours(name, folder, threads)
    model.prefill(4)  # compile the graph, touch the weights
    say(load_s=time.perf_counter() - begin)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "memory":
            say(peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        else:
            say(tokens_per_s=timed(model, command["do"], command["tokens"]))


if __name__ == "__main__":
    main()
