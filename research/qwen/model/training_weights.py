"""The weights of a checkpoint for training: float32 memory of its own for what is trained, the rest as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.native_unpack import Unpacker, unpacker
from research.qwen.kernels.packing import packing
from research.qwen.model.frozen import FrozenMatrices, Stored
from research.qwen.model.loading import storage_format
from research.qwen.model.lora import first_values
from research.qwen.model.opening import find_settings
from research.qwen.model.quantise import HEAD, Plan, Source, native_quantiser, quantised_source
from research.qwen.model.training_specs import AS_STORED, MethodSpec
from research.qwen.weights.names import expected
from research.qwen.weights.quantised import is_gptq, stored_formats
from research.qwen.weights.readers import Checkpoint, open_checkpoint

Array = NDArray[np.float32]
HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True)
class TrainingWeights:
    """``arrays``: float32 by published and LoRA names; ``trained``: the names of those that are trained, adapters
    first; ``frozen``: the matrices that are stored otherwise."""

    config: QwenConfig
    arrays: dict[str, Array]
    trained: list[str]
    frozen: FrozenMatrices

    def parameters(self) -> dict[str, Array]:
        """The trained arrays."""
        return {name: self.arrays[name] for name in self.trained}


def training_weights(
    path: Path, config: QwenConfig | None, method: MethodSpec, backend: str, seed: int
) -> TrainingWeights:
    """Open a checkpoint for a method; ``config`` None is the one beside it, ``seed`` that of new LoRA matrices.

    Raises CheckpointError, ConfigError, KernelError, TrainingError.
    """
    opened = open_checkpoint(path)
    shape = config or _config(path)
    source = quantised_source(opened, shape, _plan(method, opened), native_quantiser(backend, None))
    trained = [name for name in expected(shape) if method.kind == "full" or name in method.whole()]
    arrays, frozen = _load(source, shape, trained, unpacker(backend))
    if method.kind != "full":
        added = first_values(shape, method, seed)
        arrays, trained = arrays | added, [*added, *trained]
    return TrainingWeights(shape, arrays, trained, frozen)


def _config(path: Path) -> QwenConfig:
    settings = find_settings(path, None)
    if settings is not None:
        return settings.model
    return QwenConfig.from_folder(path if path.is_dir() else path.parent)


def _plan(method: MethodSpec, checkpoint: Checkpoint) -> Plan:
    """Formats of the frozen matrices. lm_head and wte stay as stored: each is read once a step."""
    quantised = is_gptq(checkpoint) or bool(stored_formats(checkpoint))
    if method.kind == "full" and quantised:
        raise ConfigError(
            f"{checkpoint.files[0]}: quantised weights cannot be trained themselves; use the method qlora, or start "
            "from the unquantised checkpoint"
        )
    if method.kind == "full" or method.base == AS_STORED:
        return Plan()
    names = set(checkpoint.names())
    plain_head = HEAD_WEIGHT in names and HEAD not in stored_formats(checkpoint)
    return Plan(method.base, checkpoint.dtype(HEAD_WEIGHT) if plain_head else None)


def _load(
    source: Source, config: QwenConfig, trained: Sequence[str], unpack: Unpacker
) -> tuple[dict[str, Array], FrozenMatrices]:
    """Weights in float32, and the frozen matrices that are stored otherwise.

    The head is widened once: it is needed whole in every step, so keeping its bits too would save nothing.
    """
    weights: dict[str, Array] = {}
    frozen = FrozenMatrices(unpack)
    for name, shape in expected(config).items():
        fmt = storage_format(source, name)
        packed = packing(fmt)
        if packed is None and (fmt == "float32" or name in trained or name == HEAD_WEIGHT):
            array = widen(source.read(name), source.format(name))
            own = array.flags.owndata and array.flags.writeable
            weights[name] = array if own or name not in trained else array.copy()
            continue
        stem = name.removesuffix("weight")
        arrays = {part: source.read(stem + part) for part in (packed.parts if packed else ("weight",))}
        n, k = shape  # vectors are float32 always
        stored = Stored(n, k, fmt, packed, arrays)
        if name in trained or name == HEAD_WEIGHT:
            weights[name] = np.empty(shape, np.float32)
            stored.fill(weights[name], unpack)
        else:
            frozen.add(name, stored)
    return weights, frozen
