"""A checkpoint opened for training on Ascend.

Not run on an NPU by this project; docs/finetune.md says what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mindspore as ms
from numpy.typing import NDArray

from research.qwen.errors import ConfigError, KernelError
from research.qwen.kernels.ascend_ops import FusedOps, mindspore_ops
from research.qwen.kernels.ascend_packed import Base
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.devices import ascend_problem
from research.qwen.kernels.packing import Packing
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.model.ascend_train_step import AscendTrainStep
from research.qwen.model.parallel import started_by_msrun
from research.qwen.model.training_specs import MODULES, MethodSpec, OptimizerSpec
from research.qwen.model.training_weights import TrainingWeights

DTYPES = ("float16", "bfloat16")


class _Loaded(Mapping[str, NDArray[Any]]):
    """All weights as the graph takes them, made as they are asked for: float32, or the parts of a quantised matrix."""

    def __init__(self, weights: TrainingWeights, formats: Mapping[str, Packing]) -> None:
        self._weights, self._frozen = weights, dict(weights.frozen.items())
        self._parts = {
            f"{matrix}.{part}": (matrix, part)
            for matrix, found in formats.items()
            for part in Base(found, 2, 2).shapes
        }
        self._last: tuple[str, dict[str, NDArray[Any]]] = "", {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name in self._weights.arrays:
            return self._weights.arrays[name]
        if name not in self._parts:
            return self._frozen[name].wide()
        matrix, part = self._parts[name]
        if self._last[0] != matrix:  # the parts of a matrix are asked for one after the other
            stored = self._frozen[f"{matrix}.weight"]
            if stored.packing is None:
                raise KeyError(name)
            self._last = matrix, Base(stored.packing, stored.n, stored.k).arrays(stored.arrays)
        return self._last[1][part]

    def __iter__(self) -> Iterator[str]:
        yield from {**self._weights.arrays, **self._frozen, **self._parts}

    def __len__(self) -> int:
        return len({**self._weights.arrays, **self._frozen, **self._parts})


def _formats(weights: TrainingWeights) -> dict[str, Packing]:
    """Formats of the quantised matrices of the layers; a quantised embedding is widened."""
    return {
        name.removesuffix(".weight"): stored.packing
        for name, stored in weights.frozen.items()
        if stored.packing is not None and name.startswith("transformer.h.")
    }


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
    formats = _formats(weights)
    if formats and layout is not None and layout.devices > 1:
        raise ConfigError(
            "quantised weights are trained beside on one Ascend device only; use method lora and plain weights"
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
        formats=formats,
        recompute=recompute,
        fused=fused or mindspore_ops(),
    )
    return AscendTrainStep(spec, optimizer, _Loaded(weights, formats), length, exchange)
