"""A checkpoint opened for training on Ascend.

Not run on an NPU by this project; docs/finetune.md says what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import ConfigError, KernelError
from research.qwen.kernels.ascend_ops import FusedOps, mindspore_ops
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.devices import ascend_problem
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.model.ascend_train_step import AscendTrainStep
from research.qwen.model.parallel import started_by_msrun
from research.qwen.model.training_specs import MODULES, MethodSpec, OptimizerSpec
from research.qwen.model.training_weights import TrainingWeights

DTYPES = ("float16", "bfloat16")


class _Wide(Mapping[str, NDArray[np.float32]]):
    """All weights in float32, those that are stored otherwise widened as they are asked for."""

    def __init__(self, weights: TrainingWeights) -> None:
        self._weights = weights
        self._frozen = dict(weights.frozen.items())

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name in self._weights.arrays:
            return self._weights.arrays[name]
        return self._frozen[name].wide()

    def __iter__(self) -> Iterator[str]:
        yield from self._weights.arrays
        yield from self._frozen

    def __len__(self) -> int:
        return len(self._weights.arrays) + len(self._frozen)


def select_device() -> None:
    """Make the NPU MindSpore's device, if ``join_world`` has not; KernelError with the reason if there is none."""
    problem = ascend_problem()
    if problem is not None:
        raise KernelError(
            f"training on ascend asked for, but MindSpore finds no Ascend device: {problem}; use device cpu"
        )
    if not started_by_msrun():
        ms.set_device("Ascend")


def open_ascend(
    weights: TrainingWeights,
    method: MethodSpec,
    optimizer: OptimizerSpec,
    compute_dtype: str,
    recompute: bool = False,
    exchange: Any = None,
    layout: ParallelLayout | None = None,
    packed: bool = False,
    length: int | None = None,
    seed: int = 0,
    fused: FusedOps | None = None,
) -> AscendTrainStep:
    """The step graph of a method on the loaded weights; for ``layout``, ``packed`` and ``length`` see there.

    ``seed``: of dropout. ``fused``: other operators in place of MindSpore's (tests). Raises ConfigError for what
    Ascend's graph has not.
    """
    allowed = DTYPES if fused is None else (*DTYPES, "float32")
    if compute_dtype not in allowed:
        raise ConfigError(f"training on ascend computes in {' or '.join(DTYPES)}, not {compute_dtype!r}")
    if method.kind == "qlora" or any(stored.packing for _, stored in weights.frozen.items()):
        raise ConfigError(
            "quantised weights are not trained beside on ascend; use method lora and plain weights"
        )
    saved = tuple(name for name in MODULES if MODULES[name] in method.whole())
    if "ln_f" in saved:
        raise ConfigError("modules_to_save on ascend are wte and lm_head")
    full, layout = method.kind == "full", layout or ParallelLayout()
    if layout.devices > 1:
        ms.set_auto_parallel_context(**layout.settings())
    spec = Spec(
        weights.config,
        layout,
        compute_dtype,
        # What is trained is kept in float32; frozen weights alone need no more than they are used in.
        stored="float32" if full or saved else compute_dtype,
        packed=packed,
        trained=full,
        saved=saved,
        rank=0 if full else method.rank,
        alpha=method.alpha,
        targets=method.matrices(),
        dropout=0.0 if full else method.dropout,
        seed=seed,
        recompute=recompute,
        fused=fused or mindspore_ops(),
    )
    return AscendTrainStep(spec, optimizer, _Wide(weights), length, exchange)
