"""Random checkpoints of a published shape for the benchmarks: the same numbers in every format that is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.weights.names import expected
from research.qwen.weights.writers import OutputTensor, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
STORED, WIDE, EXPORTED = "stored-bf16", "stored-f32", "qwen2"
BLOCK = 1 << 22
SPREAD = 0.02  # standard deviation of the weights


def folder_for(work: Path, contender: str) -> Path:
    """Which checkpoint a contender loads."""
    return work / {"cpu-f32": WIDE, "transformers": EXPORTED}.get(contender, STORED)


def make_checkpoints(work: Path, config: QwenConfig, contenders: list[str]) -> None:
    """Write what the contenders need and is not there yet."""
    wanted = {folder_for(work, name).name for name in contenders}
    write_random(work / STORED, config, "bfloat16")
    if WIDE in wanted:
        write_random(work / WIDE, config, "float32")
    if EXPORTED in wanted and not (work / EXPORTED).exists():
        subprocess.run(
            [
                *(sys.executable, ROOT / "convert_weight.py", "--export", "qwen2"),
                *("--torch_ckpt_dir", work / STORED, "--output", work / EXPORTED),
            ],
            check=True,
            stdout=sys.stderr,
        )


def write_random(folder: Path, config: QwenConfig, dtype: str) -> None:
    """A Hugging Face folder with normal random weights that bfloat16 holds exactly; norms are ones."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=1), encoding="utf-8")
    generation = {"chat_format": "raw", "eos_token_id": 151643, "pad_token_id": 151643, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    tensors = [random_tensor(name, shape, dtype) for name, shape in expected(config).items()]
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as stream:
        write_safetensors(stream, tensors, {"format": "pt"}, lambda count: None)
    partial.rename(folder / "model.safetensors")


def random_tensor(name: str, shape: tuple[int, ...], dtype: str) -> OutputTensor:
    """The same numbers for the same name, in bfloat16 bits or as float32."""
    norm = "ln_" in name

    def blocks() -> Iterator[NDArray[Any]]:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        left = int(np.prod(shape))
        while left:
            count = min(left, BLOCK)
            values = np.ones(count, np.float32) if norm else _normal(rng, count)
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            yield bits if dtype == "bfloat16" else (bits.astype(np.uint32) << 16).view(np.float32)
            left -= count

    return OutputTensor(name, shape, dtype, blocks)


def _normal(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Normal numbers; a long block repeats a shorter one at a random offset, which is 20 times quicker."""
    base = rng.standard_normal(min(count, 1 << 18), np.float32) * np.float32(SPREAD)
    return np.resize(np.roll(base, int(rng.integers(len(base)))), count)
