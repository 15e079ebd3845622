"""How the host trains: which cells a layer and the head are made of, what they take, and who does the plain sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.kernels import training, training_cpu
from research.qwen.kernels.build import library_path
from research.qwen.kernels.cpu import default_threads
from research.qwen.kernels.native import NativeLibrary
from research.qwen.kernels.native_training import NativeOptimizer
from research.qwen.kernels.training import LayerPlan

Array = NDArray[np.float32]


class Texts(Protocol):
    """The tokens of a batch: see ``model.training_rows.Rows``."""

    @property
    def rotary(self) -> tuple[Array, Array]: ...

    @property
    def bounds(self) -> NDArray[np.int32]: ...

    @property
    def layout(self) -> tuple[NDArray[Any], ...]: ...


@dataclass(frozen=True)
class Way:
    """``forward`` and ``backward`` make the cells of a layer, ``head`` (eps, trained), ``loss`` and ``logits`` (eps)
    those of the output. ``step`` gives what a layer takes of a batch, ``step_types`` and ``kept_types`` the tensors'
    shapes. ``head_rows``: rows of logits that live at a time. ``optimizer``: None for NumPy's sums.
    """

    forward: Callable[[LayerPlan], nn.Cell]
    backward: Callable[[LayerPlan], nn.Cell]
    head: Callable[[float, bool], nn.Cell]
    loss: Callable[[float], nn.Cell]
    logits: Callable[[float], nn.Cell]
    step: Callable[[Texts], tuple[NDArray[Any], ...]]
    step_types: Callable[[QwenConfig], list[Tensor]]
    kept_types: Callable[[QwenConfig], list[Tensor]]
    head_rows: int
    optimizer: NativeOptimizer | None = None


def reference_way() -> Way:
    """Plain operators of MindSpore and NumPy: the judge."""
    return Way(
        forward=training.LayerForward,
        backward=training.LayerBackward,
        head=training.HeadBackward,
        loss=training.HeadLoss,
        logits=training.Logits,
        step=lambda texts: (*texts.rotary, *texts.layout),
        step_types=_reference_step,
        kept_types=_reference_kept,
        head_rows=512,
    )


def cpu_way(threads: int | None = None) -> Way:
    """Everything but the matrix products in C++, on ``threads`` threads (default: as the backend cpu chooses).

    Raises KernelError without a compiler.
    """
    library = library_path()
    native = NativeLibrary(library)
    native.set_threads(default_threads() if threads is None else threads)
    return Way(
        forward=lambda plan: training_cpu.LayerForward(library, plan),
        backward=lambda plan: training_cpu.LayerBackward(library, plan),
        head=lambda eps, trained: training_cpu.HeadBackward(library, eps, trained),
        loss=lambda eps: training_cpu.HeadLoss(library, eps),
        logits=lambda eps: training_cpu.Logits(library, eps),
        step=lambda texts: (*(a.reshape(len(a), -1) for a in texts.rotary), texts.bounds),
        step_types=_cpu_step,
        kept_types=_cpu_kept,
        head_rows=1024,
        optimizer=NativeOptimizer(native),
    )


def _any(shape: list[int | None], dtype: Any = ms.float32) -> Tensor:
    return Tensor(shape=shape, dtype=dtype)


def _reference_step(config: QwenConfig) -> list[Tensor]:
    half = config.head_dim // 2
    return [
        *[_any([None, 1, half])] * 2,
        _any([None, None], ms.int32),
        _any([None], ms.int32),
        _any([None, None, 1]),
        _any([None, 1, None, None]),
    ]


def _reference_kept(config: QwenConfig) -> list[Tensor]:
    hidden, heads = _any([None, config.hidden_size]), _any([None, config.num_heads, config.head_dim])
    return [hidden, *[heads] * 3, hidden, hidden, *[_any([None, config.mlp_width])] * 2]


def _cpu_step(config: QwenConfig) -> list[Tensor]:
    return [*[_any([None, config.head_dim // 2])] * 2, _any([None], ms.int32)]


def _cpu_kept(config: QwenConfig) -> list[Tensor]:
    hidden, wide = _any([None, config.hidden_size]), _any([None, config.mlp_width])
    qkv, logs = _any([None, 3 * config.hidden_size]), _any([config.num_heads, None])
    return [hidden, qkv, hidden, logs, hidden, wide, wide]
