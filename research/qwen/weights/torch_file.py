"""Reader of torch's .bin: the one place that imports torch, and only when such a file is opened.

``weights_only=True`` lets the unpickler build tensors and nothing else, so a file that carries code is
refused.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from research.qwen.errors import CheckpointError
from research.qwen.weights.dtypes import BY_NAME
from research.qwen.weights.tensors import BLOCK_BYTES, StoredTensor, let_go

ZIP_MAGIC = b"PK\x03\x04"


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a .bin file, mapped from disk (files older than torch 1.6 are read whole).

    Raises CheckpointError if torch is not installed, the file is damaged, or it holds anything but tensors.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f'{path.name} is a torch file and torch is not installed: run pip install ".[convert]", '
            "or use the safetensors files of the model"
        ) from None
    try:
        with path.open("rb") as stream:
            mapped = stream.read(4) == ZIP_MAGIC
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; what matters becomes an error
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{path} not found") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "WeightsUnpickler" in str(error):
            raise CheckpointError(
                f"{path} is refused: it holds code, not only tensors ({_reason(error)})"
            ) from None
        raise CheckpointError(f"{path} is not a torch checkpoint: {_reason(error)}") from None
    # torch reports damage with whatever its parser stumbles over.
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        raise CheckpointError(f"{path} is truncated or not a torch checkpoint: {_reason(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a plain dictionary of tensors")
    return {str(name): TorchTensor(str(name), tensor, mapped, path) for name, tensor in state.items()}


class TorchTensor(StoredTensor):
    """A torch tensor on the CPU, usually mapped from its file."""

    def __init__(self, name: str, tensor: Any, mapped: bool, path: Path) -> None:
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        if self.dtype not in BY_NAME or tensor.layout.__str__() != "torch.strided":
            raise CheckpointError(f"{path}: {name} is of type {tensor.dtype}, {tensor.layout}; not supported")
        self.shape = tuple(int(n) for n in tensor.shape)
        # A tensor that is a view with gaps is copied before it is read: then there are no mapped pages to let
        # go.
        self._tensor, self._mapped = tensor, mapped and tensor.is_contiguous()

    def read(self) -> NDArray[Any]:
        return self._flat().reshape(self.shape)

    def blocks(self) -> Iterator[NDArray[Any]]:
        flat = self._flat()
        step = BLOCK_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            block = flat[start : start + step]
            yield block.copy() if self._mapped else block
            if self._mapped:
                let_go(block)

    def _flat(self) -> NDArray[Any]:
        import torch

        tensor = self._tensor.detach().contiguous().flatten()
        if self.dtype == "bfloat16":
            tensor = tensor.view(torch.int16)
        array: NDArray[Any] = tensor.numpy()
        return array.view(BY_NAME[self.dtype].numpy)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
