"""Open a checkpoint whatever its format: a folder or a file, safetensors, torch .bin or MindSpore .ckpt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.weights.ckpt_file import read_ckpt, verify_crc
from research.qwen.weights.names import former_parts, is_dropped, is_former, to_published
from research.qwen.weights.safetensors_file import read_metadata, read_safetensors
from research.qwen.weights.tensors import JoinedTensor, StoredTensor
from research.qwen.weights.torch_file import read_torch

# In the order a folder is searched. The first two are what Hugging Face folders hold.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
READERS: Mapping[str, Callable[[Path], dict[str, StoredTensor]]] = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".ckpt": read_ckpt,
}


class Checkpoint:
    """Tensors on disk under their published names; nothing is loaded until it is read.

    ``folder`` is where config.json is expected, ``files`` what was opened, ``dropped`` the buffers of early
    releases that were read over.
    """

    def __init__(self, folder: Path, files: list[Path], tensors: Mapping[str, StoredTensor]) -> None:
        self.folder, self.files = folder, files
        self.dropped = sorted(name for name in tensors if is_dropped(name))
        kept = {name: tensor for name, tensor in tensors.items() if name not in set(self.dropped)}
        self._tensors = _joined(kept) if is_former(kept) else _renamed(kept)

    def names(self) -> list[str]:
        """Published names, in the order of the files."""
        return list(self._tensors)

    def tensor(self, name: str) -> StoredTensor:
        """The tensor on disk; CheckpointError if there is none of this name."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.files[0]}: no tensor {name}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensor(name).shape

    def dtype(self, name: str) -> str:
        """float32, float16, bfloat16, or an integer type's name."""
        return self.tensor(name).dtype

    def read(self, name: str) -> NDArray[Any]:
        """The stored array, read-only; bfloat16 as its uint16 bits. Mapped without a copy from safetensors
        and .bin."""
        return self.tensor(name).read()

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The numbers in C order in one-dimensional blocks of some MB, read without mapping."""
        return self.tensor(name).blocks()

    def metadata(self, key: str) -> str | None:
        """A text in the header of the safetensors files; None if there is none, CheckpointError if two disagree."""
        files = [file for file in self.files if file.suffix == ".safetensors"]
        found = {text for file in files if (text := read_metadata(file).get(key)) is not None}
        if len(found) > 1:
            raise CheckpointError(f"{files[0]}: {key!r} in the header differs from another shard's")
        return found.pop() if found else None

    def verify(self) -> None:
        """Compare the checksum of a .ckpt that carries one (reads the whole file); CheckpointError if it is
        wrong."""
        for file in self.files:
            if file.suffix == ".ckpt":
                verify_crc(file)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a converted folder, or a .safetensors, .bin or .ckpt file.

    In a folder, the published file names come first (safetensors before .bin), then the only file of a known
    type. Raises CheckpointError if nothing is there, a shard is missing, or a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.suffix not in READERS:
        raise CheckpointError(
            f"{path}: unknown kind of file; known: {', '.join(READERS)}, or the model's folder"
        )
    return Checkpoint(path.parent, [path], READERS[path.suffix](path))


def _open_folder(folder: Path) -> Checkpoint:
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).exists():
            return _open_shards(folder, folder / index)
        if (folder / single).exists():
            return Checkpoint(folder, [folder / single], READERS[(folder / single).suffix](folder / single))
    found = sorted(
        file for file in folder.iterdir() if file.suffix in (".safetensors", ".ckpt") and file.is_file()
    )
    if len(found) == 1:
        return Checkpoint(folder, found, READERS[found[0].suffix](found[0]))
    if any("-of-" in file.name for file in found):
        raise CheckpointError(f"{folder} holds shards but no {INDEX_FILES[0]}; download that file too")
    if found:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"{folder} holds {len(found)} checkpoints ({names}); give the path of one")
    raise CheckpointError(
        f"{folder} holds no checkpoint: expected {SINGLE_FILES[0]}, {SINGLE_FILES[1]}, their index files, "
        "or a .ckpt"
    )


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = list(dict.fromkeys(weight_map.values()))
        sound = all(isinstance(name, str) and Path(name).name == name for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound or not shards:
        raise CheckpointError(
            f"{index} is damaged: expected a weight_map from tensor names to file names; download it again"
        )
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index.name} names {len(missing)} missing file(s): {', '.join(missing[:3])} in {folder}"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        suffix = Path(shard).suffix
        if suffix not in READERS:
            raise CheckpointError(f"{index} names {shard}: unknown kind of file")
        for name, tensor in READERS[suffix](folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name} is in two shards, one is {shard}")
            if weight_map.get(name, shard) != shard:
                raise CheckpointError(
                    f"{index.name} expects {name} in {weight_map[name]}, found it in {shard}"
                )
            tensors[name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(f"{index.name} names {len(lost)} tensor(s) no shard holds, such as {lost[0]}")
    return Checkpoint(folder, [folder / shard for shard in shards], tensors)


def _renamed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Through the table where it knows the name; a stranger keeps its name, for ``names.check`` to report."""
    out: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        try:
            out[to_published(name)] = tensor
        except CheckpointError:
            out[name] = tensor
    return out


def _joined(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names of the former MindFormers port to published names; q, k and v become one tensor."""
    out: dict[str, StoredTensor] = {}
    for name, parts in former_parts(tensors).items():
        lost = [part for part in parts if part not in tensors]
        if lost:
            raise CheckpointError(f"checkpoint of the former MindFormers port lacks {', '.join(lost)}")
        out[name] = tensors[parts[0]] if len(parts) == 1 else JoinedTensor([tensors[part] for part in parts])
    return out
