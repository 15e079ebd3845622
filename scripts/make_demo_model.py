"""Train the embedded demo model and write it as a published-layout folder. Run from the repository root:

    python -m scripts.make_demo_model

Needs torch and the package itself. One CPU core, a few minutes; the result depends on the seed and on the
build of torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from research.qwen.config import QwenConfig
from research.qwen.rope import logn_factors, ntk_alpha, rotary_tables
from research.qwen.text.tokenizer import QwenTokenizer
from scripts.demo_dialogues import Row, Sampler, all_texts, load_dialogues
from scripts.demo_vocabulary import train_bpe, write_vocabulary

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "research/qwen/demo/model"
NUM_SPECIAL = 208
# Above 0.8 sampling with the generation config (top_p 0.8) is as sure as greedy decoding.
LEAST_PROBABILITY = 0.9
# Long training rows: how many in a batch, of how many tokens.
LONG = ((4, 512), (2, 1024), (1, 1600))
CONFIG = QwenConfig(
    vocab_size=1024,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    intermediate_size=512,
    kv_channels=32,
    seq_length=512,
    max_position_embeddings=2048,
)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.heads = config.num_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        parts = self.c_attn(x).split(hidden, dim=-1)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        q, k = rotate(q, cos, sin) * logn[:, None], rotate(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(rows, length, hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on halves; x (..., T, d), cos and sin (T, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.c_proj = nn.Linear(config.mlp_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, logn)
        return x + self.mlp(self.ln_2(x))


class Qwen(nn.Module):
    """The published architecture; parameter names are the published ones."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.hidden_size),
                "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "ln_f": RMSNorm(config.hidden_size, config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, alpha: float = 1.0) -> Tensor:
        """ids (B, T) -> hidden states before lm_head (B, T, hidden); alpha is the NTK factor."""
        length = ids.shape[1]
        tables = rotary_tables([0], [length], [alpha], self.config)
        cos, sin = (torch.from_numpy(table) for table in tables)
        logn = torch.from_numpy(logn_factors(np.arange(length, dtype=np.int32), self.config))
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x, cos, sin, logn)
        return self.transformer["ln_f"](x)


def initialise(model: Qwen) -> None:
    """Scaled normal weights; the projections back into the residual stream are smaller."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 0.02 if "wte" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            if name.endswith("c_proj.weight"):
                deviation /= math.sqrt(2 * model.config.num_layers)
            nn.init.normal_(parameter, std=deviation)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def batch_loss(model: Qwen, rows: list[Row], pad: int, alpha: float) -> Tensor:
    """Mean cross entropy over the trained tokens of some rows, padded on the right."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    weights = torch.zeros((len(rows), longest))
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        weights[number, : len(row.ids)] = torch.tensor(row.weights)
    trained = weights[:, 1:] > 0
    hidden = model(ids, alpha)[:, :-1][trained]
    losses = functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][trained], reduction="none")
    return (losses * weights[:, 1:][trained]).sum() / weights.sum()


def rounded(values: list[Tensor]) -> list[Tensor]:
    """The nearest bfloat16 values, as float32."""
    return [value.to(torch.bfloat16).to(torch.float32) for value in values]


def train(model: Qwen, sampler: Sampler, steps: int) -> None:
    """AdamW with warm-up and cosine decay; the last third sees bfloat16-rounded weights."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        rate = 3e-3 * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        master = [weight.detach().clone() for weight in weights] if step > steps * 2 // 3 else None
        if master is not None:
            assign(weights, rounded(master))
        # Every fourth step is about long conversations, at and beyond seq_length.
        rows, tokens = (
            LONG[sampler.random.choices(range(len(LONG)), (4, 4, 2))[0]] if step % 4 == 3 else (8, None)
        )
        alpha = ntk_alpha(tokens or 1, model.config)
        loss = batch_loss(model, [sampler.chat_row(tokens) for _ in range(rows)], sampler.end_of_text, alpha)
        loss_raw = batch_loss(model, [sampler.raw_row() for _ in range(4)], sampler.end_of_text, 1.0)
        optimizer.zero_grad()
        (loss + 0.5 * loss_raw).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        if master is not None:
            assign(weights, master)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            losses = f"chat {loss.item():.4f}  raw {loss_raw.item():.4f}"
            print(f"step {step:5d}  {losses}  {seconds:.0f} s", flush=True)
    assign(weights, rounded([weight.detach() for weight in weights]))


def assign(weights: list[Tensor], values: list[Tensor]) -> None:
    """Overwrite parameters in place."""
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def check(model: Qwen, rows: list[Row]) -> tuple[list[Row], float]:
    """Teacher-forced: the rows that are not reproduced, and the smallest probability of any trained token.

    If every trained token has the largest logit, greedy decoding gives the row word for word.
    """
    wrong: list[Row] = []
    least = 1.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.ids])
            probabilities = model.lm_head(model(ids))[0, :-1].softmax(-1)
            mask = torch.tensor(row.weights[1:]) > 0
            targets = ids[0, 1:][mask]
            if (probabilities[mask].argmax(-1) != targets).any():
                wrong.append(row)
            least = min(least, float(probabilities[mask].gather(1, targets[:, None]).min()))
    return wrong, least


def write_safetensors(model: Qwen, path: Path) -> None:
    """bfloat16 tensors in the published names and order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, value in model.state_dict().items():
        blob = value.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        span = [offset, offset + len(blob)]
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": span}
        blobs.append(blob)
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_folder(model: Qwen, ranks: dict[bytes, int], folder: Path) -> None:
    """The model folder in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config.to_hf_dict())
    generation = {
        "chat_format": "chatml",
        "eos_token_id": len(ranks),
        "pad_token_id": len(ranks),
        "max_window_size": 1024,
        "max_new_tokens": 256,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
    }
    write_json(folder / "generation_config.json", generation)
    tokenizer = {
        "model_max_length": model.config.max_position_embeddings,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_vocabulary(ranks, folder / "qwen.tiktoken")
    write_safetensors(model, folder / "model.safetensors")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        prog="make_demo_model", description="Train and write the embedded demo model."
    )
    parser.add_argument("--output", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--steps", type=int, default=1650)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, check with the exact bfloat16 weights, write; exit code 1 and nothing written if that fails."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    data = load_dialogues()
    ranks = train_bpe(all_texts(data), CONFIG.vocab_size - NUM_SPECIAL)
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(ranks, Path(folder) / "qwen.tiktoken")
        tokenizer = QwenTokenizer(Path(folder) / "qwen.tiktoken")
    sampler = Sampler(data, tokenizer.encode, tokenizer.eod_id, args.seed)
    model = Qwen(replace(CONFIG, vocab_size=math.ceil(len(tokenizer) / 64) * 64))
    initialise(model)
    print(f"{len(ranks)} ranks, {sum(weight.numel() for weight in model.parameters())} parameters")
    train(model, sampler, args.steps)
    wrong, least = check(model, sampler.fixed_rows())
    fresh = Sampler(data, tokenizer.encode, tokenizer.eod_id, args.seed + 1000)
    lost, _ = check(model, [fresh.chat_row() for _ in range(200)] + [fresh.raw_row() for _ in range(100)])
    print(
        f"fixed rows: {len(wrong)} wrong, least probability {least:.4f}; of 300 fresh rows {len(lost)} wrong"
    )
    if wrong or least < LEAST_PROBABILITY:
        texts = [tokenizer.decode(row.ids) for row in wrong]
        print(
            "error: the model does not hold its dialogues; nothing written", *texts, sep="\n", file=sys.stderr
        )
        return 1
    write_folder(model, ranks, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
