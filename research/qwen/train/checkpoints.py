"""Checkpoints of a run: folders ``step-000100`` that appear whole or not at all, rotated, found and checked.

Each holds what the caller's hook writes (an adapter, or a model's folder: usable as it is) and ``training/`` with all
that a bit-identical resume needs: ``state.json`` and ``arrays.safetensors``. ``state.json`` lists the size of every
file and the CRC-32 of every array, so that a damaged checkpoint is refused and not learned on from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError, TrainingError
from research.qwen.weights.convert import filler
from research.qwen.weights.dtypes import FORMATS
from research.qwen.weights.outputs import TMP_MARK, OutputSet, new_folder
from research.qwen.weights.safetensors_file import read_safetensors
from research.qwen.weights.tensors import BLOCK_BYTES
from research.qwen.weights.writers import OutputTensor, safetensors_size

FORMAT = 1
STATE, ARRAYS = "state.json", "arrays.safetensors"
INNER = "training"
NAME = re.compile(r"step-(\d{6,})")
SLACK = 1 << 20  # room for the small files, in bytes
DTYPES = {item.numpy: item.name for item in FORMATS if item.name != "bfloat16"}

SaveModel = Callable[[Path], None]  # writes adapter or model into an empty folder


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back: its folder, the values given to ``save``, and the arrays: mapped, to read only."""

    folder: Path
    step: int
    state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class Checkpoints:
    """The checkpoints in one folder, of one run; the last ``keep_last`` and the best are kept."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self._keep = Path(os.path.abspath(folder)), keep_last

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        found = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match, path in found if match and path.is_dir())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.folder / f"step-{step:06d}"

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        save_model: SaveModel | None = None,
        best: int | None = None,
        model_bytes: int = 0,
    ) -> Path:
        """Write a checkpoint, then remove those that are neither among the last nor of step ``best``.

        ``state`` holds what JSON can (no NaN); ``arrays`` any numbers that safetensors knows.
        Raises TrainingError if it cannot be written, for want of space for instance; those before are untouched then.
        """
        final = self.path(step)
        try:
            tensors = [_Array(name, values) for name, values in arrays.items()]
            self._need_space(tensors, model_bytes)
            with new_folder(final) as output:
                if save_model is not None:
                    save_model(output.folder)
                with OutputSet(output.folder / INNER) as inner:
                    inner.write(ARRAYS, filler(".safetensors", [one.output for one in tensors], _ignore))
                files = _sizes(output.folder)
                crcs = {one.name: one.crc for one in tensors}
                document = {"format": FORMAT, "step": step, "files": files, "arrays": crcs, "state": state}
                _write_state(output.folder, document)
                _sync(output.folder)
            _sync_one(self.folder)
        except (CheckpointError, OSError) as error:
            raise TrainingError(self._failed(step, error)) from None
        self._rotate(step, best)
        return final

    def update(self, step: int, state: Mapping[str, Any]) -> Path:
        """Replace the values, not the arrays, of a checkpoint that exists; raises as ``save`` does."""
        folder = self.path(step)
        try:
            _write_state(folder, {**_document(folder), "state": state})
        except (CheckpointError, OSError) as error:
            raise TrainingError(self._failed(step, error)) from None
        return folder

    def find(self, which: str | Path) -> Path:
        """The folder meant by ``latest``, ``best`` or a path; TrainingError if there is none."""
        newest = self.latest()
        if str(which) not in ("latest", "best"):
            if not Path(which).is_dir():
                raise TrainingError(f"no checkpoint {which}; give latest, best, or the folder of one")
            return Path(os.path.abspath(which))
        if newest is None:
            raise TrainingError(
                f"there is no checkpoint in {self.folder} to resume from; start without resume"
            )
        if str(which) == "latest":
            return newest
        best = _document(newest)["state"].get("best_step")
        if best is None:
            raise TrainingError(
                f"{newest} knows of no best checkpoint: nothing was evaluated; resume from latest"
            )
        if not self.path(best).is_dir():
            raise TrainingError(f"the best checkpoint, {self.path(best)}, is gone; resume from latest")
        return self.path(best)

    def clear_leftovers(self) -> None:
        """Remove half-written folders that a killed run left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"step-*{TMP_MARK}*"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> list[Path]:
        """Rename the checkpoints after ``step``, which another course of the run left, to ``step-000100.aside``."""
        moved = []
        for later in [one for one in self.steps() if one > step]:
            source, number = self.path(later), 1
            target = source.with_name(f"{source.name}.aside")
            while target.exists():
                number += 1
                target = source.with_name(f"{source.name}.aside-{number}")
            os.replace(source, target)
            moved.append(target)
        return moved

    def check_space(self, arrays: Mapping[str, NDArray[Any]], model_bytes: int = 0) -> None:
        """TrainingError if a checkpoint of such arrays, and of a model of so many bytes, does not fit."""
        try:
            self._need_space([_Array(name, values) for name, values in arrays.items()], model_bytes)
        except CheckpointError as error:
            raise TrainingError(f"checkpoints cannot be written: {error}") from None

    def _need_space(self, tensors: list[_Array], model_bytes: int) -> None:
        with OutputSet(self.folder) as output:
            newest = self.latest()
            if newest is not None:
                files = _sizes(newest)  # what the hook writes is as large as last time
                written = sum(size for name, size in files.items() if not name.startswith(f"{INNER}/"))
                model_bytes = max(model_bytes, written)
            output.need_space(safetensors_size([one.output for one in tensors]) + model_bytes + SLACK)

    def _rotate(self, step: int, best: int | None) -> None:
        earlier = [one for one in self.steps() if one <= step]
        for old in earlier[: -self._keep]:
            if old != best:
                # Under a name no reader takes first: a crash half-way must not leave half a checkpoint.
                doomed = self.path(old).with_name(f"{self.path(old).name}{TMP_MARK}old")
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(self.path(old), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> str:
        newest = self.latest()
        last = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return f"the checkpoint of step {step} could not be written: {error}. Training has stopped; {last}"


class _Array:
    """An array on its way into the file; ``crc`` is right once it has been written."""

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        values = np.asarray(values)
        kind = values.dtype.newbyteorder("<") if values.dtype.itemsize > 1 else values.dtype
        assert kind in DTYPES, f"{name}: safetensors has no {values.dtype}"
        self.name, self.crc, self._values = name, 0, values
        self.output = OutputTensor(name, values.shape, DTYPES[kind], self._blocks)

    def _blocks(self) -> Iterator[NDArray[Any]]:
        flat = self._values.astype(self._values.dtype.newbyteorder("<"), copy=False).reshape(-1)
        count = BLOCK_BYTES // flat.itemsize
        self.crc = 0
        for start in range(0, flat.size, count):
            block = np.ascontiguousarray(flat[start : start + count])
            self.crc = zlib.crc32(block.view(np.uint8).data, self.crc)
            yield block


def load_checkpoint(folder: Path) -> Saved:
    """Read a checkpoint; CheckpointError, with its name, if it is incomplete or damaged."""
    document = _document(folder)
    found = _sizes(folder)
    for name, size in document["files"].items():
        if found.get(name) != size:
            has = f"has {found[name]} bytes" if name in found else "is missing"
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} {has}, written were {size}; resume from another one"
            )
    try:
        stored = read_safetensors(folder / INNER / ARRAYS)
        arrays = {name: tensor.read() for name, tensor in stored.items()}
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from None
    crcs = document["arrays"]
    wrong = [name for name, crc in crcs.items() if name not in arrays or _crc(arrays[name]) != crc]
    if wrong or len(arrays) != len(crcs):
        raise CheckpointError(
            f"checkpoint {folder} is damaged: the numbers of {', '.join(wrong[:3]) or ARRAYS} are not those that were "
            "written; resume from another one"
        )
    return Saved(folder, document["step"], document["state"], arrays)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Settings that differ, as ``lr: 1e-05 there, 2e-05 now``; nested names are joined by dots.

    ``free`` are full names that may differ.
    """
    old, new = _flat(plain(saved)), _flat(plain(now))
    names = [name for name in [*old, *(name for name in new if name not in old)] if name not in free]
    nothing = object()
    return [
        f"{name}: {_shown(old, name)} there, {_shown(new, name)} now"
        for name in names
        if old.get(name, nothing) != new.get(name, nothing)
    ]


def refuse_changes(
    folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]
) -> None:
    """TrainingError that names the settings in which a run differs from the one that left ``folder``."""
    changes = differences(saved, now, free)
    if changes:
        # What the loop and the data make of the settings is told only where no setting explains it.
        own = [one for one in changes if not one.startswith(("loop.", "data."))] or changes
        raise TrainingError(
            f"{folder} was trained with other settings: {'; '.join(own)}. Give the same ones, or start anew in another "
            "output folder"
        )


def plain(value: Any) -> Any:
    """Settings as JSON holds them: tuples are lists, everything unknown (paths) is text."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            out |= _flat(inner, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = inner
    return out


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"


def _document(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, its outline checked."""
    path = folder / INNER / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint to resume from: {INNER}/{STATE} is missing")
    kinds = {"format": int, "step": int, "files": dict, "arrays": dict, "state": dict}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        sound = all(type(document[key]) is kind for key, kind in kinds.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {INNER}/{STATE} cannot be read; resume from another one"
        )
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} is of format {document['format']}; this version reads {FORMAT}"
        )
    return dict(document)


def _write_state(folder: Path, document: Mapping[str, Any]) -> None:
    with OutputSet(folder / INNER, force=True) as output:
        output.write_text(STATE, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file but state.json, by its path in the folder."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in sorted(files.items()) if name != f"{INNER}/{STATE}"}


def _sync(folder: Path) -> None:
    """Have every file and folder below on the disk, whoever wrote them."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc(values: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _ignore(_count: int) -> None:
    pass
