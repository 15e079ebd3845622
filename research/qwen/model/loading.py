"""Checkpoint to parameters: strict in both directions, and without a copy where the backend can use stored memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.kernels.api import Kernels
from research.qwen.kernels.arrays import widen
from research.qwen.kernels.packing import ORDERED, packing
from research.qwen.model.qwen import QwenModel
from research.qwen.weights.names import expected

SMALL = (".bias", ".ln_1.weight", ".ln_2.weight", ".ln_f.weight")
_STATE = ("key_cache", "value_cache", "key_scales", "value_scales", "addresses")


class TensorSource(Protocol):
    """What the loader needs of a checkpoint: the published names, or the packed arrays of a quantised matrix
    (``X.weight``, ``X.scales``, ...) in their place."""

    def names(self) -> list[str]:
        """Names of the tensors."""

    def format(self, name: str) -> str:
        """How the published tensor is stored: float32, float16, bfloat16, or the text of a quantisation scheme."""

    def read(self, name: str) -> NDArray[np.generic]:
        """The stored array; bfloat16 as uint16 bits."""


def is_cache(name: str) -> bool:
    """Whether a parameter is a backend's own, such as the KV cache, and not a weight."""
    return name.endswith(_STATE)


def weight_parameters(model: QwenModel) -> dict[str, Parameter]:
    """Name -> parameter, caches left out."""
    return {name: p for name, p in model.parameters_and_names() if not is_cache(name)}


def storage_format(source: TensorSource, name: str) -> str:
    """The format a weight is kept in: matrices as stored, biases and norms in float32."""
    if name.endswith(SMALL):
        return "float32"
    fmt = source.format(name)
    ordered = packing(fmt) is not None and name.removesuffix("weight") + "order" in source.names()
    return fmt + ORDERED if ordered else fmt


def load_weights(model: QwenModel, source: TensorSource, kernels: Kernels, config: QwenConfig) -> None:
    """Set every parameter from the checkpoint. Names and shapes were checked against the config before.

    Raises CheckpointError if a parameter is left without data or a tensor without parameter.
    """
    parameters = weight_parameters(model)
    wanted = expected(config)
    left, extra = set(parameters), set(source.names())
    missing = sorted(set(wanted) - extra)
    for name, shape in wanted.items():
        if name in missing:
            continue
        values, used = _tensors(name, shape, source, kernels)
        extra -= used
        for parameter, value in values.items():
            if parameter in parameters:
                parameters[parameter].set_data(value, slice_shape=True)
                left.discard(parameter)
    if missing or left or extra:
        raise CheckpointError(
            f"checkpoint does not match the model: {len(missing)} tensors missing {(missing or sorted(left))[:3]}, "
            f"{len(extra)} without a place {sorted(extra)[:3]}"
        )


def _tensors(
    name: str, shape: tuple[int, ...], source: TensorSource, kernels: Kernels
) -> tuple[dict[str, Tensor], set[str]]:
    """Parameter name -> value for one published tensor, and the names of the stored arrays that were used."""
    fmt = storage_format(source, name)
    packed = packing(fmt)
    try:
        if packed is None:
            stored = source.format(name)
            array = source.read(name)
            if name.endswith(SMALL):
                array = widen(array, stored)
            return {name: kernels.parameter(array, fmt)}, {name}
        stem = name.removesuffix("weight")
        arrays = {part: source.read(stem + part) for part in packed.parts}
        table = stem.endswith(".wte.")
        n, k = shape
        tensors = kernels.quantised_parameters(arrays, str(packed.scheme), n, k, table=table)
        return {stem + part: tensor for part, tensor in tensors.items()}, {stem + part for part in arrays}
    except CheckpointError as error:  # the backend knows the value, only we know the name
        raise CheckpointError(f"{name}: {error}") from error
