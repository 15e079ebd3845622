"""Make the small fixtures of the tests from the full golden data.

    python scripts/make_fixtures.py --golden DIR [--out tests/fixtures]

The golden data is 25 MB; the tests need the same facts in less than 6 MB, so this script keeps every id array
and every layer trace, and reduces only what repeats itself:

* logits keep the columns ``::vocab_stride`` (an int in the same .npz); ``<name>_argmax`` and ``<name>_max`` keep
  the winner of the whole row. A test compares ``logits[..., ::vocab_stride]`` and the argmax.
* cached keys of longctx keep the positions ``::key_stride``.
* the two models with a large vocabulary keep the rows of wte and lm_head that a golden run reads; the others are
  zero (a zero row of lm_head gives logit 0). ``kept_ids`` holds the rows kept in lm_head. For full_vocab_bf16 the
  logsumexp arrays are dropped, and ``text0_last_logits`` holds the columns ``kept_ids`` only.
* models that shrink under xz are stored as ``model.tar.xz``; ``tests.fixtures_util.model_folder`` unpacks them.

The pruning is proved here: on the pruned weights every golden greedy run is repeated and must give the same
ids, each with a logit above 1. Needs torch and safetensors.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SMALL_MODELS = ("st_new_bf16", "bin_old_fp16")
VOCAB_STRIDE = {"st_new_bf16": 8, "bin_old_fp16": 8, "bin_sharded_fp32": 10, "longctx": 10}
KEY_STRIDE = 5
MODEL_SUFFIXES = (".json", ".safetensors", ".bin")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the full golden data")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "fixtures"
    )
    args = parser.parse_args(argv)
    for name in SMALL_MODELS:
        source, target = args.golden / "models" / name, _fresh(args.out / "models" / name)
        for path in _model_files(source):
            shutil.copyfile(path, target / path.name)
        for file in ("golden.npz", "trace.npz"):
            _save(target / file, reduce_logits(_load(source / file), VOCAB_STRIDE[name]))
    _pruned_sharded(
        args.golden / "models" / "bin_sharded_fp32", _fresh(args.out / "models" / "bin_sharded_fp32")
    )
    _pruned_full_vocab(
        args.golden / "models" / "full_vocab_bf16", _fresh(args.out / "models" / "full_vocab_bf16")
    )
    _longctx(args.golden / "longctx", _fresh(args.out / "longctx"))
    folders = (args.out / "models", args.out / "longctx")
    total = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    print(f"{total / 1e6:.2f} MB in {args.out}")
    return 0 if total < 6e6 else 1


def reduce_logits(arrays: dict[str, np.ndarray], stride: int) -> dict[str, np.ndarray]:
    """Every ``*logits`` (..., V) becomes (..., ceil(V / stride)) with ``_argmax`` and ``_max`` (...,) of the
    whole row beside it."""
    out: dict[str, np.ndarray] = {"vocab_stride": np.array(stride)}
    for name, value in arrays.items():
        if name.endswith("logits"):
            out[f"{name}_argmax"] = value.argmax(-1).astype(np.int32)
            out[f"{name}_max"] = value.max(-1)
            value = np.ascontiguousarray(value[..., ::stride])
        out[name] = value
    return out


def _pruned_sharded(source: Path, target: Path) -> None:
    golden, trace = _load(source / "golden.npz"), _load(source / "trace.npz")
    vocab = golden["prompt0_logits"].shape[-1]
    stride = VOCAB_STRIDE["bin_sharded_fp32"]
    reduced, reduced_trace = reduce_logits(golden, stride), reduce_logits(trace, stride)
    read = _ids_in(golden) | _ids_in(trace)
    heads = read | set(range(0, vocab, stride))
    for part in (reduced, reduced_trace):
        heads |= {int(i) for name in part if name.endswith("_argmax") for i in part[name].ravel()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in _model_files(source):
            if path.suffix == ".bin":
                state = torch.load(path, weights_only=True)
                torch.save(_prune(state, read, heads), folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.bin")):
            weights |= torch.load(path, weights_only=True)
        config = json.loads((folder / "config.json").read_text())
        for kind, penalty in (("greedy", 1.0), ("rep", 1.1)):
            for i in range(3):
                prompt = golden[f"prompt{i}_ids"]
                _check_run(weights, config, golden[f"{kind}{i}_ids"], len(prompt), penalty)
            name = "batch_greedy_ids" if kind == "greedy" else "batch_rep_ids"
            for row, mask in zip(golden[name], golden["batch_mask"], strict=True):
                pads = int((mask == 0).sum())
                if (
                    kind == "greedy" or not pads
                ):  # padding counts for the penalty, so a padded row cannot be repeated bare
                    _check_run(weights, config, row[pads:], len(mask) - pads, penalty)
        _pack(folder, target / "model.tar.xz")
    reduced["kept_ids"] = np.array(sorted(heads), np.int32)
    _save(target / "golden.npz", reduced)
    _save(target / "trace.npz", reduced_trace)


def _pruned_full_vocab(source: Path, target: Path) -> None:
    golden = _load(source / "golden.npz")
    chats = [json.loads(line) for line in (source / "chat.jsonl").read_text().splitlines()]
    read = _ids_in(golden)
    for chat in chats:
        read |= set(chat["context_tokens"]) | set(chat["free_running_new_ids"])
        read |= {i for words in chat["extra_stop_words_ids"] for i in words}
    read |= {151643, 151644, 151645}
    heads = read | {int(i) for name in golden if name.endswith("top_ids") for i in golden[name].ravel()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights: dict[str, torch.Tensor] = {}
        for path in _model_files(source):
            if path.suffix == ".safetensors":
                state = _prune(load_file(path), read, heads)
                save_file(state, folder / path.name, metadata={"format": "pt"})
                weights |= state
            else:
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        for i in range(3):
            _check_run(weights, config, golden[f"text{i}_greedy_ids"], len(golden[f"text{i}_ids"]), 1.0)
        for chat in chats:
            prompt = chat["context_tokens"]
            ids = np.array(prompt + chat["free_running_new_ids"])
            _check_run(weights, config, ids, len(prompt), chat["repetition_penalty"])
        _pack(folder, target / "model.tar.xz")
    kept = np.array(sorted(heads), np.int32)
    golden["text0_last_logits"] = golden["text0_last_logits"][kept]
    golden = {name: value for name, value in golden.items() if not name.endswith("logsumexp")}
    golden["kept_ids"] = kept
    _save(target / "golden.npz", golden)
    shutil.copyfile(source / "chat.jsonl", target / "chat.jsonl")


def _longctx(source: Path, target: Path) -> None:
    _pack(source / "model", _fresh(target / "model") / "model.tar.xz")
    for path in sorted(source.glob("*.npz")):
        arrays = reduce_logits(_load(path), VOCAB_STRIDE["longctx"])
        for name in arrays:
            if name.endswith("_key"):
                arrays[name] = np.ascontiguousarray(arrays[name][::KEY_STRIDE])
        arrays["key_stride"] = np.array(KEY_STRIDE)
        _save(target / path.name, arrays)


def _prune(state: dict[str, torch.Tensor], read: set[int], heads: set[int]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        rows = {"transformer.wte.weight": read, "lm_head.weight": heads}.get(name)
        if rows is not None:
            kept = torch.zeros_like(tensor)
            index = torch.tensor(sorted(rows))
            kept[index] = tensor[index]
            tensor = kept
        out[name] = tensor
    return out


def _check_run(weights: dict, config: dict, ids: np.ndarray, prompt: int, penalty: float) -> None:
    """Teacher-forced: every id after the prompt must win on the pruned weights, with a logit above 1."""
    logits = _forward(weights, config, torch.tensor(np.asarray(ids[:-1])))
    for position in range(prompt - 1, len(ids) - 1):
        row = logits[position].clone()
        seen = torch.tensor(np.unique(ids[: position + 1]))
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        best = int(row.argmax())
        if best != int(ids[position + 1]) or float(row[best]) <= 1:
            raise SystemExit(
                f"pruning changed a golden run at position {position + 1}: {best} {float(row[best]):.3f}"
            )


def _forward(weights: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """(T,) ids to (T, V) float32 logits; texts within seq_length only."""
    heads, eps = config["num_attention_heads"], config["layer_norm_epsilon"]
    w = {name: tensor.float() for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    length, d = len(ids), config["kv_channels"]
    inverse = 1.0 / config["rotary_emb_base"] ** (torch.arange(0, d, 2).float() / d)
    angle = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)[None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * angle.cos() + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * angle.sin()

    x = w["transformer.wte.weight"][ids]
    causal = torch.full((length, length), -math.inf).triu(1)
    for n in range(config["num_hidden_layers"]):
        h = f"transformer.h.{n}"
        y = norm(x, f"{h}.ln_1") @ w[f"{h}.attn.c_attn.weight"].T + w[f"{h}.attn.c_attn.bias"]
        q, k, v = (part.view(length, heads, d).transpose(0, 1) for part in y.chunk(3, -1))
        scores = rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(d) + causal
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1) @ w[f"{h}.attn.c_proj.weight"].T
        y = norm(x, f"{h}.ln_2")
        gate = torch.nn.functional.silu(y @ w[f"{h}.mlp.w2.weight"].T)
        x = x + (y @ w[f"{h}.mlp.w1.weight"].T * gate) @ w[f"{h}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def _ids_in(arrays: dict[str, np.ndarray]) -> set[int]:
    """Every id of the integer arrays that hold token ids (positions and counters add a few harmless small
    numbers)."""
    return {
        int(i)
        for name, value in arrays.items()
        if value.dtype.kind == "i" and not name.endswith("top_ids")
        for i in value.ravel()
    }


def _pack(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in _model_files(folder):
            data = path.read_bytes()
            info = tarfile.TarInfo(path.name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _model_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    sys.exit(main())
