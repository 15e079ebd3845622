"""Checkpoint to parameters: strict in both directions, and without a copy where the backend can use stored memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from mindspore import Parameter
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.kernels.api import Kernels
from research.qwen.kernels.arrays import widen
from research.qwen.model.qwen import QwenModel

SMALL = (".bias", ".ln_1.weight", ".ln_2.weight", ".ln_f.weight")


class TensorSource(Protocol):
    """What the loader needs of a checkpoint (weights.readers.Checkpoint is one)."""

    def names(self) -> list[str]:
        """Tensor names as published."""

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""

    def read(self, name: str) -> NDArray[np.generic]:
        """The stored array; bfloat16 as uint16 bits."""


def is_cache(name: str) -> bool:
    """Whether a parameter name is a KV cache and not a weight."""
    return name.endswith(("key_cache", "value_cache"))


def weight_parameters(model: QwenModel) -> dict[str, Parameter]:
    """Published name -> parameter, caches left out."""
    return {name: p for name, p in model.parameters_and_names() if not is_cache(name)}


def storage_format(source: TensorSource, name: str) -> str:
    """The format a weight is kept in: matrices as stored, biases and norms in float32."""
    return "float32" if name.endswith(SMALL) else source.dtype(name)


def load_weights(model: QwenModel, source: TensorSource, kernels: Kernels) -> None:
    """Set every parameter from the checkpoint. Names and shapes were checked against the config before.

    Raises CheckpointError if a parameter is left without data or a tensor without parameter.
    """
    parameters = weight_parameters(model)
    names = set(source.names())
    missing, extra = sorted(set(parameters) - names), sorted(names - set(parameters))
    if missing or extra:
        raise CheckpointError(
            f"checkpoint does not match the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} without a place {extra[:3]}"
        )
    for name, parameter in parameters.items():
        array, fmt = source.read(name), source.dtype(name)
        if name.endswith(SMALL):
            array, fmt = widen(array, fmt), "float32"
        try:
            value = kernels.parameter(array, fmt)
        except CheckpointError as error:  # the backend knows the value, only we know the name
            raise CheckpointError(f"{name}: {error}") from error
        parameter.set_data(value, slice_shape=True)
