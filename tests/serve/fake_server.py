"""``python -m tests.serve.fake_server OPTIONS``: the command ``serve`` with a fake model, for tests with real signals.

The variables FAKE_LOAD and FAKE_STEP give the seconds of loading and of each step, FAKE_FAIL how it fails: ``load`` by
an error for users, ``steps`` once it is asked for more than a few tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from research.qwen.cli import serve
from research.qwen.decode.loop import Chunk
from research.qwen.engine import Engine
from research.qwen.errors import CheckpointError
from research.qwen.scheduler import Scheduler
from tests.fakes import FakeLM
from tests.serve.running import demo_tokenizer


class SlowLM(FakeLM):
    """Takes its time for every step."""

    steps = 0

    def forward(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """As FakeLM, later."""
        self.steps += 1
        if os.environ.get("FAKE_FAIL") == "steps" and self.steps > 20:
            raise RuntimeError("broken")
        time.sleep(float(os.environ.get("FAKE_STEP", "0.005")))
        rows: NDArray[np.float32] = super().forward(chunks)
        return rows


def load(args: argparse.Namespace) -> tuple[Engine, Scheduler]:
    """In the place of the command's own."""
    time.sleep(float(os.environ.get("FAKE_LOAD", "0")))
    if os.environ.get("FAKE_FAIL") == "load":
        raise CheckpointError("the checkpoint is broken; get another")
    tokenizer = demo_tokenizer()
    lm = SlowLM(num_blocks=2048, vocab_size=len(tokenizer), max_length=4096)
    engine = Engine(lm, tokenizer, generation={"chat_format": "chatml"}, max_batch=args.max_batch)
    return engine, Scheduler(engine, max_queue=args.max_queue)


if __name__ == "__main__":
    from research.qwen.cli import main

    serve.load = load
    sys.exit(main(["serve", *sys.argv[1:]]))
