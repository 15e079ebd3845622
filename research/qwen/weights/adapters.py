"""LoRA adapters as files: peft's folder (adapter_config.json, adapter_model.safetensors or .bin) and MindSpore .ckpt.

Inside the project a matrix ``transformer.h.0.attn.c_attn`` (n_out, n_in) has ``….lora_A.weight`` (r, n_in) and
``….lora_B.weight`` (n_out, r); matrices trained whole keep the published name. peft puts ``base_model.model.`` in
front. W' = W + scale * B A, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.weights.adapter_config import CONFIG_FILE, WHOLE_MODULES, AdapterConfig
from research.qwen.weights.companions import json_text
from research.qwen.weights.convert import filler
from research.qwen.weights.dtypes import FLOATS, convert_block
from research.qwen.weights.names import expected
from research.qwen.weights.outputs import new_folder
from research.qwen.weights.readers import READERS
from research.qwen.weights.tensors import BLOCK_BYTES, StoredTensor
from research.qwen.weights.writers import OutputTensor, safetensors_size

PREFIX = "base_model.model."
STEM = "adapter_model"
FILES = (f"{STEM}.safetensors", f"{STEM}.bin", f"{STEM}.ckpt")  # in the order a folder is searched
HALVES = ("lora_A", "lora_B")
WHOLE = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
_HALF = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix: ``scale * b @ a``, a (r, n_in), b (n_out, r), float32."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop`` of the update, float32 (stop - start, n_in)."""
        out: NDArray[np.float32] = self.b[start:stop] @ self.a
        out *= np.float32(self.scale)
        return out


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: every matrix has both halves, of one rank, and all numbers are finite.

    ``tensors``: the halves by name, float32. ``saved``: matrices trained whole by published name, still on disk.
    ``where``: the file, for messages.
    """

    config: AdapterConfig
    tensors: Mapping[str, NDArray[np.float32]]
    saved: Mapping[str, StoredTensor]
    where: str = "adapter"

    @classmethod
    def from_arrays(
        cls, config: AdapterConfig, arrays: Mapping[str, NDArray[np.float32]], where: str = "adapter"
    ) -> Adapter:
        """From arrays by our names, halves and whole matrices together. Raises as ``load_adapter`` does."""
        return _adapter(config, {name: ArrayTensor(array) for name, array in arrays.items()}, where)

    def updates(self) -> dict[str, LowRank]:
        """Matrix (published name without ``.weight``) -> its update."""
        found = {}
        for name, a in self.tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                found[module] = LowRank(a, self.tensors[f"{module}.lora_B.weight"], self.config.scale(module))
        return found

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All tensors in float32 by our names; whole matrices are read into memory."""
        wide = {name: convert_block(t.read(), t.dtype, "float32")[0] for name, t in self.saved.items()}
        return {**self.tensors, **wide}


class ArrayTensor(StoredTensor):
    """A float32 array in the place of a tensor on disk."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self._array = np.ascontiguousarray(array, np.float32)
        self.shape, self.dtype = self._array.shape, "float32"

    def read(self) -> NDArray[Any]:
        return self._array

    def blocks(self) -> Iterator[NDArray[Any]]:
        flat, step = self._array.reshape(-1), BLOCK_BYTES // 4
        return (flat[start : start + step] for start in range(0, flat.size, step))


def is_adapter(path: str | Path) -> bool:
    """Whether a folder, or the folder of a file, is an adapter's."""
    path = Path(path)
    return ((path if path.is_dir() else path.parent) / CONFIG_FILE).is_file()


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter's folder, or one weights file of it (adapter_config.json beside it).

    Raises ConfigError if the config is missing or describes no plain LoRA; CheckpointError if the weights are
    missing, damaged, not finite, lack a half, or do not have the rank the config says.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such adapter: {path}")
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG_FILE).is_file():
        hint = " (it holds a model, not an adapter)" if (folder / "config.json").is_file() else ""
        raise ConfigError(
            f"{folder} holds no {CONFIG_FILE}{hint}; give the folder that peft or the trainer wrote"
        )
    config = AdapterConfig.from_file(folder / CONFIG_FILE)
    file = _weights_file(folder) if path.is_dir() else path
    if file.suffix not in READERS:
        raise CheckpointError(
            f"{file}: unknown kind of file; known: {', '.join(READERS)}, or the adapter's folder"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in READERS[file.suffix](file).items():
        ours = _our_name(name)
        if ours in tensors:
            raise CheckpointError(f"{file}: {ours} occurs twice")
        tensors[ours] = tensor
    return _adapter(config, tensors, str(file))


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    base: str | None = None,
    force: bool = False,
    dtype: str = "float32",
    ckpt: bool = False,
) -> None:
    """Write the folder that peft loads: it appears whole or not at all.

    ``base``: name of the model it belongs to, for adapter_config.json (None: as it is). ``dtype``: number format of
    the file. ``ckpt``: also adapter_model.ckpt with our names, for MindSpore. An existing folder is refused unless
    ``force``.
    Raises CheckpointError: exists, disk full, a number too large for ``dtype``.
    """
    config = adapter.config if base is None else replace(adapter.config, base=base)
    tensors = _outputs(adapter, dtype)
    total = safetensors_size(tensors) * (2 if ckpt else 1)
    with new_folder(Path(folder), force, owned=lambda name: name in FILES) as output:
        output.need_space(total + (1 << 16))
        published = [replace(tensor, name=PREFIX + tensor.name) for tensor in tensors]
        output.write(FILES[0], filler(".safetensors", published, lambda count: None, "pt"))
        if ckpt:
            output.write(FILES[2], filler(".ckpt", tensors, lambda count: None))
        output.write_text(CONFIG_FILE, json_text(config.to_dict()))


def check_fits(adapter: Adapter, config: QwenConfig) -> None:
    """Whether an adapter belongs to a model of this shape; CheckpointError says what does not fit."""
    want = expected(config)
    model = f"this model ({config.num_layers} layers, hidden {config.hidden_size}, MLP {config.mlp_width}, " \
            f"vocabulary {config.vocab_size})"  # fmt: skip
    updates = adapter.updates()
    for module, update in updates.items():
        shape = want.get(f"{module}.weight")
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"{adapter.where} is for another model: {model} has no matrix {module}")
        for half, have, need in (("A", update.a.shape, (update.rank, shape[1])),
                                 ("B", update.b.shape, (shape[0], update.rank))):  # fmt: skip
            if have != need:
                raise CheckpointError(
                    f"{adapter.where} is for another model: {module}.lora_{half}.weight is {have}, {model} needs {need}"
                )
    for name, tensor in adapter.saved.items():
        if tensor.shape != want[name]:
            raise CheckpointError(
                f"{adapter.where} is for another model: {name} is {tensor.shape}, {model} needs {want[name]}"
            )
    if adapter.config.partial:
        return
    matrices = [name.removesuffix(".weight") for name, shape in want.items() if len(shape) == 2]
    missing = [name for name in matrices if adapter.config.is_target(name) and name not in updates]
    missing = [name for name in missing if f"{name}.weight" not in adapter.saved]
    if missing:
        raise CheckpointError(
            f"{adapter.where} is incomplete or for another model: target_modules name {missing[0]} and "
            f"{len(missing) - 1} more of {model}, but there are no weights for them"
        )


def _adapter(config: AdapterConfig, tensors: Mapping[str, StoredTensor], where: str) -> Adapter:
    """Sort and check the tensors."""
    strange = [name for name in tensors if _HALF.fullmatch(name) is None and name not in WHOLE.values()]
    if strange:
        raise CheckpointError(
            f"{where}: unexpected tensor {strange[0]}; an adapter holds lora_A and lora_B of the model's matrices, and "
            f"{' and '.join(WHOLE_MODULES)} whole"
        )
    for name, tensor in tensors.items():
        _check_numbers(name, tensor, where)
    halves = {
        name: np.ascontiguousarray(convert_block(tensor.read(), tensor.dtype, "float32")[0])
        for name, tensor in tensors.items()
        if name not in WHOLE.values()
    }
    saved = {name: tensor for name, tensor in tensors.items() if name in WHOLE.values()}
    lost = [WHOLE[name] for name in config.modules_to_save if WHOLE[name] not in saved]
    if lost:
        raise CheckpointError(f"{where}: modules_to_save names {lost[0]}, but it is missing")
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors")
    _check_halves(config, halves, where)
    listed = tuple(name for name in WHOLE_MODULES if WHOLE[name] in saved)
    return Adapter(replace(config, modules_to_save=listed), halves, saved, where)


def _check_halves(config: AdapterConfig, halves: Mapping[str, NDArray[np.float32]], where: str) -> None:
    for name, array in halves.items():
        found = _HALF.fullmatch(name)
        assert found is not None
        module, half = found[1], found[2]
        other = f"{module}.{HALVES[1 - HALVES.index(half)]}.weight"
        if other not in halves:
            raise CheckpointError(f"{where}: {name} is there, {other} is missing")
        if array.ndim != 2:
            raise CheckpointError(f"{where}: {name} has shape {array.shape}, expected a matrix")
        rank = array.shape[HALVES.index(half)]
        stated = config.module_rank(module)
        if rank != stated:
            raise CheckpointError(
                f"{where}: {name} of shape {array.shape} has rank {rank}, {CONFIG_FILE} says {stated}"
            )


def _check_numbers(name: str, tensor: StoredTensor, where: str) -> None:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{where}: {name} is of type {tensor.dtype}, expected {', '.join(FLOATS)}")
    bad = sum(
        int(np.count_nonzero(~np.isfinite(convert_block(block, tensor.dtype, "float32")[0])))
        for block in tensor.blocks()
    )
    if bad:
        raise CheckpointError(
            f"{where}: {bad} of {tensor.size} values of {name} are NaN or infinite: the training diverged; take an "
            "earlier checkpoint"
        )


def _weights_file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds {CONFIG_FILE} but no weights; expected {', '.join(FILES)}")


def _our_name(name: str) -> str:
    """peft's name to ours, also as it is spelt inside a model that is being trained."""
    name = name.removeprefix(PREFIX)
    name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    found = _HALF.fullmatch(name)
    return f"{found[1]}.{found[2]}.weight" if found else name


def _outputs(adapter: Adapter, dtype: str) -> list[OutputTensor]:
    """What the writers take, sorted by name as peft does."""
    if dtype not in FLOATS:
        raise CheckpointError(f"an adapter cannot be written as {dtype}; known: {', '.join(FLOATS)}")
    stored = {name: ArrayTensor(array) for name, array in adapter.tensors.items()} | dict(adapter.saved)
    return [
        OutputTensor(name, tensor.shape, dtype, partial(_converted, name, tensor, dtype))
        for name, tensor in sorted(stored.items())
    ]


def _converted(name: str, tensor: StoredTensor, dtype: str) -> Iterator[NDArray[Any]]:
    for block in tensor.blocks():
        changed, infinite = convert_block(block, tensor.dtype, dtype)
        if infinite:
            raise CheckpointError(f"{name}: values too large for {dtype}; write the adapter as float32")
        yield changed
