"""Random checkpoints of a published shape for the benchmarks: the same numbers in every format that is asked for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.weights.names import expected
from research.qwen.weights.writers import OutputTensor, write_safetensors
from scripts.bench_gguf import quantize, write_gguf

ROOT = Path(__file__).resolve().parents[1]
STORED, EXPORTED = "bfloat16", "qwen2"
BLOCK = 1 << 22
SPREAD = 0.02  # standard deviation of the weights
SMALLEST = np.float32(2.0**-14)  # no weight is a subnormal number of any storage type


def make_all(
    work: Path, config: QwenConfig, files: dict[str, str], threads: int, progress: Callable[[str], None]
) -> list[str]:
    """Write what the contenders (name -> file) need and is not there yet; a note for each whose package is missing."""
    notes = []
    for name, file in files.items():
        package = {"llama": "llama_cpp", "trans": "transformers"}.get(name[:5])
        if package and importlib.util.find_spec(package) is None:
            notes.append(f"{name}: {package} is not installed")
        elif not (work / file).exists():
            progress(f"making {work / file}")
            make(work, config, file, threads)
    return notes


def make(work: Path, config: QwenConfig, file: str, threads: int) -> None:
    """One checkpoint, and first the one it is made of."""
    plain = work / STORED
    write_random(plain, config, "bfloat16")
    if file == EXPORTED:
        _python(
            "convert_weight.py", "--export", "qwen2", "--torch_ckpt_dir", plain, "--output", work / EXPORTED
        )
    elif file in ("int4", "int8"):
        _python("-m", "research.qwen.cli", "quantize", plain, work / file, "--dtype", file)
    elif file.endswith(".gguf"):
        gguf, recipe = work / "f16.gguf", Path(file).stem
        write_gguf(plain, gguf)
        if recipe != "f16":
            quantize(gguf, work / file, recipe, threads)


def _python(*command: str | Path) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr, cwd=ROOT)


def write_random(folder: Path, config: QwenConfig, dtype: str, embedding: float | None = None) -> None:
    """A Hugging Face folder with normal random weights that bfloat16 holds exactly; norms are ones.

    ``embedding``: standard deviation of the embeddings, if not that of the other weights.
    """
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=1), encoding="utf-8")
    generation = {"chat_format": "raw", "eos_token_id": 151643, "pad_token_id": 151643, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    # As the published code initialises: what is added to the residual stream is scaled by the number of additions.
    added = 1 / np.sqrt(2 * config.num_layers)

    def spread(name: str) -> float:
        if ".wte." in name and embedding is not None:
            return embedding
        return SPREAD * (added if "c_proj" in name else 1)

    tensors = [random_tensor(name, shape, dtype, spread(name)) for name, shape in expected(config).items()]
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as stream:
        write_safetensors(stream, tensors, {"format": "pt"}, lambda count: None)
    partial.rename(folder / "model.safetensors")


def random_tensor(name: str, shape: tuple[int, ...], dtype: str, spread: float = SPREAD) -> OutputTensor:
    """The same numbers for the same name, in bfloat16 bits or as float32."""
    norm = "ln_" in name

    def blocks() -> Iterator[NDArray[Any]]:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        left = int(np.prod(shape))
        while left:
            count = min(left, BLOCK)
            values = np.ones(count, np.float32) if norm else _normal(rng, count, spread)
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            yield bits if dtype == "bfloat16" else (bits.astype(np.uint32) << 16).view(np.float32)
            left -= count

    return OutputTensor(name, shape, dtype, blocks)


def _normal(rng: np.random.Generator, count: int, spread: float) -> NDArray[np.float32]:
    """Normal numbers; a long block repeats a shorter one at a random offset, which is 20 times quicker."""
    base = rng.standard_normal(min(count, 1 << 18), np.float32) * np.float32(spread)
    base = np.copysign(np.maximum(np.abs(base), SMALLEST), base)
    return np.resize(np.roll(base, int(rng.integers(len(base)))), count)
