"""One contender of bench_finetune.py: loads a model for training, then makes a step for every line it reads."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_worker import die_with_parent, memory, say  # noqa: E402

LR, RANK, ALPHA = 1e-4, 64, 16
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """A batch as the data pipeline makes it: (B, S) each."""

    ids: Ints
    labels: Ints
    positions: Ints
    segments: Ints


class Side(Protocol):
    """A model, its optimizer and its library."""

    def step(self, rows: Rows) -> float:
        """One update; the mean loss before it."""

    def describe(self) -> dict[str, Any]:
        """Versions and the number of trained parameters."""


class Ours:
    """This project, backend cpu or reference."""

    def __init__(self, folder: Path, method: str, dropout: float, threads: int, backend: str):
        import os

        os.environ["QWEN_THREADS"] = str(threads)
        from research.qwen.model.open_training import open_training
        from research.qwen.model.training_specs import MethodSpec, OptimizerSpec

        spec = MethodSpec(method, RANK, ALPHA, dropout, ("c_attn", "c_proj", "w1", "w2"))
        optimizer = OptimizerSpec(*BETAS, EPS, DECAY, "published", CLIP)
        self.training = open_training(folder, None, spec, optimizer, backend=backend, seed=1)

    def describe(self) -> dict[str, Any]:
        import mindspore

        count = sum(a.size for a in self.training.trainable().values())
        return {"version": f"mindspore {mindspore.__version__}", "trained": count}

    def step(self, rows: Rows) -> float:
        return self.training.step([rows], LR).loss


class Peer:
    """Qwen2ForCausalLM, torch's fused AdamW and, for LoRA, peft; weights and adapters begin with the same numbers."""

    def __init__(self, folder: Path, method: str, dropout: float, threads: int, dtype: str):
        import torch
        from transformers import Qwen2ForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        kind = getattr(torch, dtype)
        self.model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa")
        self.model.config.use_cache = False
        if method == "lora":
            self._adapt(folder, dropout)
        self.model.train()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        groups = [
            {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": DECAY},
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def _adapt(self, folder: Path, dropout: float) -> None:
        from peft import LoraConfig, get_peft_model

        from research.qwen.config import QwenConfig
        from research.qwen.model.lora import first_values
        from research.qwen.model.training_specs import MethodSpec

        wanted = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS))
        self.model = get_peft_model(self.model, wanted)
        spec = MethodSpec("lora", RANK, ALPHA, dropout, ("c_attn", "c_proj", "w1", "w2"))
        ours = first_values(QwenConfig.from_folder(folder.parent / "qwen"), spec, 1)
        names = dict(
            zip(TARGETS, 3 * ["attn.c_attn"] + ["attn.c_proj", "mlp.w2", "mlp.w1", "mlp.c_proj"], strict=True)
        )
        for name, parameter in self.model.named_parameters():
            if "lora_A" in name:
                layer, module = (
                    name.split(".layers.")[1].split(".")[0],
                    name.split(".lora_A")[0].split(".")[-1],
                )
                value = ours[f"transformer.h.{layer}.{names[module]}.lora_A.weight"]
                parameter.data.copy_(self.torch.from_numpy(value))

    def describe(self) -> dict[str, Any]:
        import peft
        import transformers

        versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {self.torch.__version__}"
        return {"version": versions, "trained": sum(p.numel() for p in self.parameters)}

    def step(self, rows: Rows) -> float:
        tensor = self.torch.from_numpy
        mask = rows.segments >= 0
        more = {} if mask.all() else {"attention_mask": tensor(mask.astype(np.int64))}
        labels = tensor(rows.labels.astype(np.int64))
        loss = self.model(input_ids=tensor(rows.ids.astype(np.int64)), labels=labels, **more).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def load(args: argparse.Namespace) -> Side:
    """The contender."""
    if args.side in ("cpu", "reference"):
        return Ours(args.work / "qwen", args.method, args.dropout, args.threads, args.side)
    dtype = "bfloat16" if args.side == "peer-bf16" else "float32"
    return Peer(args.work / "qwen2", args.method, args.dropout, args.threads, dtype)


def main() -> None:
    """Load, then answer until standard input closes; a line is {"batch": FILE.npz}."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("cpu", "reference", "peer", "peer-bf16"))
    parser.add_argument("work", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args()
    begin = time.perf_counter()
    side = load(args)
    say(load_s=time.perf_counter() - begin, **side.describe(), **memory())
    gc.collect()
    for line in sys.stdin:
        with np.load(json.loads(line)["batch"]) as file:
            rows = Rows(*(file[name] for name in ("ids", "labels", "positions", "segments")))
        begin, used = time.perf_counter(), time.process_time()
        loss = side.step(rows)
        spent = {"seconds": time.perf_counter() - begin, "processor_s": time.process_time() - used}
        say(**spent, loss=loss, tokens=int((rows.segments >= 0).sum()), **memory())


if __name__ == "__main__":
    main()
