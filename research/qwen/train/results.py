"""What a run leaves to use: an adapter in peft's layout, or a model as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import TrainingError
from research.qwen.model.training_specs import MATRICES
from research.qwen.train.checkpoints import INNER
from research.qwen.train.preparing import Prepared
from research.qwen.train.recipe import Recipe
from research.qwen.weights import companions
from research.qwen.weights.adapter_config import AdapterConfig
from research.qwen.weights.adapters import Adapter, save_adapter
from research.qwen.weights.convert import MAX_SHARD, main_dtype, parse_size, planned, silent, write_shards
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.names import expected
from research.qwen.weights.outputs import TMP_MARK, OutputSet
from research.qwen.weights.writers import OutputTensor

Arrays = Mapping[str, NDArray[np.float32]]
ROWS = 1 << 21  # values converted at a time


def result_name(recipe: Recipe) -> str:
    """The folder in the output folder that holds the finished model or adapter."""
    return "model" if recipe.method == "full" else "adapter"


def saver(run: Prepared, arrays: Callable[[], Arrays]) -> Callable[[Path], None]:
    """What writes the trained weights into a checkpoint's folder; ``arrays`` gives them by our names."""
    if run.recipe.method == "full":
        return lambda folder: write_model(folder, run, arrays())
    return lambda folder: write_adapter(folder, run.recipe, arrays())


def written_bytes(run: Prepared) -> int:
    """About what ``saver`` writes: adapters in float32 and twice, models as their base is stored."""
    if run.recipe.method == "full":
        return sum(run.checkpoint.tensor(name).nbytes for name in run.checkpoint.names())
    return 8 * run.estimate.trainable


def write_adapter(folder: Path, recipe: Recipe, arrays: Arrays) -> None:
    """adapter_config.json, adapter_model.safetensors and adapter_model.ckpt."""
    config = AdapterConfig(
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        targets=target_names(recipe),
        modules_to_save=recipe.modules_to_save,
        dropout=recipe.lora_dropout,
        base=os.path.abspath(recipe.model) if recipe.model else "",
    )
    adapter = Adapter.from_arrays(config, arrays, f"the adapter for {folder.name}")
    save_adapter(folder, adapter, ckpt=True)


def target_names(recipe: Recipe) -> tuple[str, ...]:
    """Targets as peft matches them, by the end of a module's name: both ``c_proj`` as one."""
    found = set(recipe.method_spec().matrices())
    both = {"attn.c_proj", "mlp.c_proj"}
    names = [name for name in MATRICES if name in found and not (both <= found and name in both)]
    short = [name if name in both else name.rpartition(".")[2] for name in names]
    return (*short, "c_proj") if both <= found else tuple(short)


def write_model(folder: Path, run: Prepared, arrays: Arrays) -> None:
    """The whole model in the number formats of its base, with the small files beside it."""
    formats = {tensor.name: tensor.dtype for tensor in planned(run.checkpoint, run.config, None, str)}
    tensors = [
        OutputTensor(name, shape, formats[name], partial(_blocks, arrays[name], formats[name], name))
        for name, shape in expected(run.config).items()
    ]
    with OutputSet(folder, force=True) as output:
        write_shards(output, tensors, silent, parse_size(MAX_SHARD))
        for name, data in companions.copied_files(run.checkpoint.folder).items():
            output.write_bytes(name, data)
        output.write_text("config.json", companions.config_text(run.config, main_dtype(tensors)))


def _blocks(array: NDArray[np.float32], dtype: str, name: str) -> Iterator[NDArray[Any]]:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, ROWS):
        block = flat[start : start + ROWS]
        changed, infinite = convert_block(block, "float32", dtype)
        if infinite or not np.isfinite(block).all():
            raise TrainingError(f"{name} has grown beyond what {dtype} can hold; the training has diverged")
        yield changed


def publish(checkpoint: Path, target: Path) -> Path:
    """Give the weights of a checkpoint their final name: hard links where the file system has them, copies elsewhere.

    What is at ``target`` is replaced as a whole. Raises TrainingError if it cannot be written.
    """
    fresh = target.with_name(f"{target.name}{TMP_MARK}{os.getpid()}")
    old = target.with_name(f"{target.name}{TMP_MARK}old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for path in sorted(checkpoint.iterdir()):
            if path.name != INNER:
                _link(path, fresh / path.name)
        shutil.rmtree(old, ignore_errors=True)
        if target.is_dir():
            os.replace(target, old)
        os.replace(fresh, target)
    except OSError as error:
        raise TrainingError(
            f"the result could not be written to {target}: {error.strerror}; it is in {checkpoint}"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
