"""Weights between MindFormers' dictionaries of Parameters, our model and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.kernels.api import Kernels
from research.qwen.kernels.arrays import STORED, widen
from research.qwen.model.loading import SMALL, is_cache
from research.qwen.model.quantise import Plan, quantised_source
from research.qwen.weights.adapters import check_fits, load_adapter
from research.qwen.weights.names import expected
from research.qwen.weights.readers import open_checkpoint

# Training leaves these in a checkpoint beside the weights.
_NO_WEIGHTS = frozenset(
    ("global_step", "epoch_num", "step_num", "loss_scale", "scale_sense", "learning_rate")
)
_OPTIMIZER = ("adam_m.", "adam_v.", "moments.", "accu_grads.", "moment1.", "moment2.")


class ParameterSource:
    """A dictionary of Parameters, as mindspore.load_checkpoint returns it, seen as a checkpoint.

    A prefix that all names share (a wrapper's name, such as ``model.``) is cut off.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        kept = {name: p for name, p in parameters.items() if not _no_weight(name)}
        cut = _common_prefix(list(kept))
        self._parameters = {name[cut:]: p for name, p in kept.items()}

    def names(self) -> list[str]:
        """Published names."""
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""
        kind = str(self._parameters[name].dtype).lower()
        return (
            "bfloat16" if kind == "uint16" else kind
        )  # bits, if mindspore.save_checkpoint wrote a model of ours

    def format(self, name: str) -> str:
        """The same: nothing here is quantised."""
        return self.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """The array; bfloat16 as its uint16 bits."""
        array = self._parameters[name].asnumpy()
        return np.asarray(array).view(np.uint16) if self.dtype(name) == "bfloat16" else array


class AdaptedSource:
    """A base checkpoint with an adapter added: exact sums in float32, made as they are read.

    Quantised bases are widened first. Raises CheckpointError as ``load_adapter`` does, if the adapter names no base or
    is for another model.
    """

    def __init__(self, path: Path, config: QwenConfig) -> None:
        adapter = load_adapter(path)
        if not adapter.config.base or not Path(adapter.config.base).exists():
            raise CheckpointError(
                f"{path} is an adapter for {adapter.config.base or 'a base it does not name'}, which is not here: "
                "merge it with its base (command merge) and give the result"
            )
        check_fits(adapter, config)
        base = open_checkpoint(Path(adapter.config.base))
        self.folder = base.folder
        plain = quantised_source(base, config, Plan(), progress=False)
        self._base = quantised_source(base, config, Plan("float32")) if plain.formats else plain
        self._updates, self._whole = adapter.updates(), adapter.saved

    def names(self) -> list[str]:
        """Published names."""
        return self._base.names()

    def format(self, name: str) -> str:
        """float32 where something was added, else that of the base."""
        changed = name in self._whole or name.removesuffix(".weight") in self._updates
        return "float32" if changed else self._base.format(name)

    def read(self, name: str) -> NDArray[Any]:
        """W + scale * B A; what the adapter trained whole is in place of the base's."""
        if name in self._whole:
            tensor = self._whole[name]
            return widen(tensor.read(), tensor.dtype)
        array, update = self._base.read(name), self._updates.get(name.removesuffix(".weight"))
        if update is None:
            return array
        added = update.rows(0, array.shape[0])
        added += widen(array, self._base.format(name))
        return added


class ZeroSource:
    """All weights zero and of the right shapes; no memory is used until something is written there."""

    def __init__(self, config: QwenConfig, fmt: str) -> None:
        self._shapes, self._fmt = expected(config), fmt

    def names(self) -> list[str]:
        """Published names."""
        return list(self._shapes)

    def format(self, name: str) -> str:
        """The format of matrices; biases and norms are float32."""
        return "float32" if name.endswith(SMALL) else self._fmt

    def read(self, name: str) -> NDArray[Any]:
        """Zeros."""
        return np.zeros(self._shapes[name], STORED[self.format(name)])


def initial_format(param_init_type: str, kernels: Kernels) -> str:
    """The format parameters have before a checkpoint is loaded.

    A Parameter that MindFormers may fill must have MindSpore's own number type, so bfloat16, which a CPU backend keeps
    as bits, is widened there. A checkpoint loaded by us keeps the format it is stored in.
    """
    if param_init_type == "bfloat16" and kernels.name != "ascend":
        return "float32"
    return param_init_type


def _no_weight(name: str) -> bool:
    return is_cache(name) or name in _NO_WEIGHTS or name.startswith(_OPTIMIZER)


def _common_prefix(names: list[str]) -> int:
    """Length of what comes before ``transformer.`` or ``lm_head.`` in every name; 0 if the names differ there."""
    prefixes = set()
    for name in names:
        start = min((name.find(top) for top in ("transformer.", "lm_head.") if top in name), default=-1)
        prefixes.add(name[:start] if start >= 0 else None)
    only = prefixes.pop() if len(prefixes) == 1 else None
    return len(only) if only else 0
