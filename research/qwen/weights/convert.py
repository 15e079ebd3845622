"""Convert checkpoints between Hugging Face and MindSpore, both ways, in a few blocks of memory.

A tensor is read, changed in format if asked, and written block by block. Output files appear whole or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.weights import companions
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.names import check, expected, to_mindspore
from research.qwen.weights.outputs import OutputSet, new_folder
from research.qwen.weights.readers import Checkpoint, open_checkpoint
from research.qwen.weights.writers import (
    OutputTensor,
    Progress,
    ckpt_size,
    safetensors_size,
    write_ckpt,
    write_safetensors,
)

DEFAULT_NAME = "qwen.safetensors"
MAX_SHARD = "10GB"
SLACK = 1 << 20  # room for the small files, in bytes
ProgressBar = Callable[[int], Progress]  # total bytes -> function that takes byte counts


@dataclass(frozen=True)
class Summary:
    """What a run wrote."""

    path: Path
    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def silent(_total: int) -> Progress:
    """A progress bar that shows nothing."""
    return lambda count: None


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    force: bool = False,
    bar: ProgressBar = silent,
) -> Summary:
    """Hugging Face folder (or file) to ``target``, a .ckpt or .safetensors file, with config, vocabulary and
    YAML beside it.

    ``target`` that is a folder or ends with a slash means ``target/qwen.safetensors``. ``dtype`` None keeps
    every tensor as stored. Peak memory above the interpreter's is a few blocks of 8 MB, whatever the size.

    Raises CheckpointError: source damaged or not fitting its config; target exists; a number too large for
    ``dtype``; no space. ConfigError: config.json missing or of another model.
    """
    checkpoint, config = open_with_config(source)
    path = target_file(target)
    if any(path.exists() and path.samefile(file) for file in checkpoint.files):
        raise CheckpointError(f"{path} is the checkpoint to read; choose another name")
    tensors = planned(checkpoint, config, dtype, to_mindspore)
    size = ckpt_size(tensors) if path.suffix == ".ckpt" else safetensors_size(tensors)
    with OutputSet(path.parent, force) as output:
        yaml = path.with_suffix(".yaml").name
        output.refuse_existing(path.name)
        output.need_space(size + SLACK)
        if not companions.same_model(path.parent / "config.json", config):
            output.write_text("config.json", companions.config_text(config, main_dtype(tensors)))
        for name, data in companions.copied_files(checkpoint.folder).items():
            output.write_bytes(name, data)
        output.write_text(yaml, companions.predict_yaml(checkpoint.folder, config, path.name))
        progress = bar(sum(tensor.nbytes for tensor in tensors))
        output.write(path.name, filler(path.suffix, tensors, progress))
    return summarise(path, tensors)


def reverse(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
    config_file: str | Path | None = None,
) -> Summary:
    """A MindSpore .ckpt or .safetensors (or folder) back to a Hugging Face folder with bit-identical tensors.

    config.json is taken from beside the source unless given. Raises as ``convert`` does.
    """
    checkpoint, config = open_with_config(source, config_file)
    tensors = planned(checkpoint, config, dtype, lambda published: published)
    with new_folder(Path(target), force, owned=is_weights_file) as output:
        output.need_space(safetensors_size(tensors) + SLACK)
        write_shards(output, tensors, bar, parse_size(MAX_SHARD) if max_shard is None else max_shard)
        for name, data in companions.copied_files(checkpoint.folder).items():
            output.write_bytes(name, data)
        output.write_text("config.json", companions.config_text(config, main_dtype(tensors)))
    return summarise(Path(target), tensors)


def planned(
    checkpoint: Checkpoint, config: QwenConfig, dtype: str | None, rename: Callable[[str], str]
) -> list[OutputTensor]:
    """The tensors to write, in the table's order; CheckpointError if the checkpoint does not fit the
    config."""
    check(checkpoint, config)
    return [
        OutputTensor(rename(name), shape, dtype or checkpoint.dtype(name), _blocks(checkpoint, name, dtype))
        for name, shape in expected(config).items()
    ]


def write_shards(
    output: OutputSet, tensors: Sequence[OutputTensor], bar: ProgressBar, max_shard: int
) -> None:
    """model.safetensors, or numbered shards of at most ``max_shard`` bytes and their index."""
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > max_shard:
            shards.append([])
        shards[-1].append(tensor)
    total = sum(tensor.nbytes for tensor in tensors)
    progress = bar(total)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True):
        output.write(name, filler(".safetensors", shard, progress, "pt"))
    if len(shards) > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        output.write_text("model.safetensors.index.json", companions.json_text(index))


def target_file(target: str | Path) -> Path:
    """The weights file a user means by ``target``; CheckpointError for an unknown suffix."""
    path = Path(target)
    if str(target).endswith(("/", os.sep)) or path.is_dir():
        path = path / DEFAULT_NAME
    if path.suffix not in (".ckpt", ".safetensors"):
        raise CheckpointError(
            f"{path}: unknown kind of output; end it with .ckpt or .safetensors, or give a folder"
        )
    return Path(os.path.abspath(path))


def is_weights_file(name: str) -> bool:
    """Whether a file of a Hugging Face folder holds weights (or is their index)."""
    return bool(re.fullmatch(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name))


def main_dtype(tensors: Sequence[OutputTensor]) -> str:
    """The format most bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``10GB`` or a bare number; CheckpointError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if size < 1:
        raise CheckpointError(f"--max_shard_size {text!r} is not a size; write it as 10GB or 500MB")
    return size


def open_with_config(
    source: str | Path, config_file: str | Path | None = None
) -> tuple[Checkpoint, QwenConfig]:
    """A checkpoint, its checksum compared, and its config; CheckpointError or ConfigError if either is not
    sound."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    folder = Path(config_file or path)
    config = QwenConfig.from_folder(folder if folder.is_dir() else folder.parent)
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    return checkpoint, config


def _blocks(checkpoint: Checkpoint, name: str, dtype: str | None) -> Callable[[], Iterator[NDArray[Any]]]:
    stored = checkpoint.dtype(name)

    def run() -> Iterator[NDArray[Any]]:
        lost = 0
        for block in checkpoint.blocks(name):
            changed, infinite = convert_block(block, stored, dtype or stored)
            lost += infinite
            yield changed
        if lost:
            way_out = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
            raise CheckpointError(
                f"{name}: {lost} of {checkpoint.tensor(name).size} values are too large for {dtype}: they "
                f"would become infinite; use --dtype {way_out}"
            )

    return run


def filler(
    suffix: str,
    tensors: Sequence[OutputTensor],
    progress: Progress,
    framework: str = "ms",
    metadata: Mapping[str, str] | None = None,
) -> Callable[[BinaryIO], None]:
    """What OutputSet.write needs for a .ckpt or .safetensors file; ``metadata`` goes into the latter's header."""

    def fill(stream: BinaryIO) -> None:
        if suffix == ".ckpt":
            write_ckpt(stream, tensors, progress)
        else:
            write_safetensors(stream, tensors, {"format": framework, **(metadata or {})}, progress)

    return fill


def summarise(path: Path, tensors: Sequence[OutputTensor], warnings: tuple[str, ...] = ()) -> Summary:
    """What was written, for the last line of a run."""
    dtypes = tuple(sorted({tensor.dtype for tensor in tensors}))
    return Summary(path, len(tensors), sum(tensor.nbytes for tensor in tensors), dtypes, warnings)
