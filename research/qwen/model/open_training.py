"""A checkpoint opened for training, on whichever backend."""

from __future__ import annotations

from pathlib import Path

from research.qwen.config import QwenConfig
from research.qwen.errors import KernelError
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.kernels.training_ways import cpu_way, reference_way
from research.qwen.model.ascend_train_step import AscendTrainStep
from research.qwen.model.open_ascend import open_ascend, select_device
from research.qwen.model.optimizer import AdamW
from research.qwen.model.stepping import Exchange, loss_scale
from research.qwen.model.train_step import TrainStep
from research.qwen.model.training import TrainingModel
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from research.qwen.model.training_weights import training_weights

BACKENDS = ("reference", "cpu")


def open_training(
    checkpoint: str | Path,
    config: QwenConfig | None = None,
    method: MethodSpec | None = None,
    optimizer: OptimizerSpec | None = None,
    compute_dtype: str = "float32",
    backend: str = "reference",
    seed: int = 0,
    recompute: bool = False,
    exchange: Exchange | None = None,
    layout: ParallelLayout | None = None,
    packed: bool = False,
    length: int | None = None,
) -> TrainStep | AscendTrainStep:
    """Load a checkpoint (anything that ``open_model`` takes) for training.

    ``config`` None is the one beside the checkpoint. ``seed``: of new LoRA matrices and of dropout. ``recompute``: keep
    only the input of every layer and run it again in the backward pass. For Ascend alone: ``layout`` over devices,
    ``packed`` whether rows hold several texts, ``length`` of every row (None: a graph for each that comes). Raises
    CheckpointError, ConfigError, KernelError, TrainingError.
    """
    method, optimizer = method or MethodSpec(), optimizer or OptimizerSpec()
    if backend == "ascend":
        select_device()
        found = training_weights(Path(checkpoint), config, method, backend, seed)
        return open_ascend(
            found, method, optimizer, compute_dtype, recompute, exchange, layout, packed, length, seed
        )
    if backend not in BACKENDS:
        raise KernelError(
            f"backend {backend!r} does not train here; choose one of {', '.join(BACKENDS)}, ascend"
        )
    if compute_dtype != "float32":
        raise KernelError(f"training on the CPU computes in float32, not {compute_dtype!r}")
    way = cpu_way() if backend == "cpu" else reference_way()
    found = training_weights(Path(checkpoint), config, method, backend, seed)
    model = TrainingModel(
        found.config, method, found.arrays, found.trained, seed, recompute, found.frozen, way
    )
    parameters = found.parameters()
    scale = loss_scale(optimizer, compute_dtype)
    native = way.optimizer
    adamw = AdamW(optimizer, parameters, *((native.update, native.square_sum) if native else ()))
    return TrainStep(found.config, model, parameters, adamw, scale, exchange)
