"""Small checkpoints to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.weights.dtypes import BY_NAME
from research.qwen.weights.readers import Checkpoint, open_checkpoint
from research.qwen.weights.writers import OutputTensor, write_ckpt, write_safetensors
from tests.fixtures_util import model_folder

Tensors = dict[str, tuple[str, NDArray[Any]]]  # name -> (dtype, array)


def copy_model(name: str, target: Path) -> Path:
    """A golden model's folder, to change."""
    shutil.copytree(model_folder(name), target)
    return target


def tensors_of(source: Path | Checkpoint) -> Tensors:
    """Every tensor of a checkpoint, in memory."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return {name: (checkpoint.dtype(name), checkpoint.read(name)) for name in checkpoint.names()}


def outputs(tensors: Tensors) -> list[OutputTensor]:
    """What the writers take."""

    def blocks(array: NDArray[Any]) -> Callable[[], Any]:
        return lambda: iter([np.ascontiguousarray(array).ravel()])

    return [OutputTensor(name, array.shape, dtype, blocks(array)) for name, (dtype, array) in tensors.items()]


def write(path: Path, tensors: Tensors) -> Path:
    """A .ckpt or .safetensors file with any tensors in it."""
    with path.open("wb") as stream:
        if path.suffix == ".ckpt":
            write_ckpt(stream, outputs(tensors), lambda count: None)
        else:
            write_safetensors(stream, outputs(tensors), {"format": "pt"}, lambda count: None)
    return path


def single_file_model(folder: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> Path:
    """st_new_bf16 as one model.safetensors, its tensors changed."""
    copy_model("st_new_bf16", folder)
    tensors = change(tensors_of(folder))
    for path in folder.glob("model*"):
        path.unlink()
    write(folder / "model.safetensors", tensors)
    return folder


def assert_same(
    left: Mapping[str, tuple[str, NDArray[Any]]], right: Mapping[str, tuple[str, NDArray[Any]]]
) -> None:
    """Same names, formats and bits."""
    assert set(left) == set(right)
    for name, (dtype, array) in left.items():
        assert right[name][0] == dtype, name
        bits = f"u{BY_NAME[dtype].numpy.itemsize}"
        assert np.array_equal(array.view(bits), right[name][1].view(bits)), name


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        value.pop(key, None)
        if new is not None:
            value[key] = new
    path.write_text(json.dumps(value))
