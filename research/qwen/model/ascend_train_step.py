"""Training on Ascend: the host's side of the step graph, with the methods of a TrainStep.

Not run on an NPU by this project; docs/finetune.md says what is checked and how. Rows are padded to one length, since
graphs of fused operators are compiled for a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.kernels.ascend_cells import converted
from research.qwen.kernels.ascend_train_graph import StagedModel, StepGraph, TrainingModel
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.parallel_layout import bands, published_name
from research.qwen.model.train_step import FIRST, SECOND, Alone, Exchange, LossScale, StepResult
from research.qwen.model.training_rows import IGNORED, BatchLike, count_targets
from research.qwen.model.training_specs import OptimizerSpec
from research.qwen.rope import inverse_frequencies

Array = NDArray[np.float32]


def step_arrays(
    batches: Sequence[BatchLike], config: QwenConfig, length: int | None, share: float, packed: bool
) -> tuple[NDArray[Any], ...]:
    """ids, targets, shares (T,), cos, sin (B, S, d), mask (B, S, S) of the rows of all batches, S = ``length``.

    Without a ``length`` S is that of the longest batch.

    A token predicts the next one of the same text; ``share`` is what it counts where its label is not ignored.
    TrainingError for a row beyond ``length`` or an id outside the vocabulary.
    """
    length = length or max(batch.ids.shape[1] for batch in batches)
    ids, labels, positions, segments = (
        np.concatenate([_padded(getattr(batch, name), length, fill) for batch in batches])
        for name, fill in (("ids", 0), ("labels", IGNORED), ("positions", 0), ("segments", -1))
    )
    targets = np.zeros_like(ids)
    targets[:, :-1] = labels[:, 1:]
    learned = np.zeros(ids.shape, np.bool_)
    learned[:, :-1] = (
        (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0) & (labels[:, 1:] != IGNORED)
    )
    targets = np.where(learned, targets, 0).astype(np.int32)
    ids = np.where(segments >= 0, ids, 0).astype(np.int32)
    for what, values in (("token id", ids), ("label", targets)):
        if values.min() < 0 or values.max() >= config.vocab_size:
            bad = int(values[(values < 0) | (values >= config.vocab_size)][0])
            raise TrainingError(f"{what} {bad} is outside the vocabulary of {config.vocab_size} rows")
    angles = positions[:, :, None] * inverse_frequencies(config.head_dim, config.rotary_emb_base, 1.0)
    angles = np.concatenate([angles, angles], -1).astype(np.float32)
    if packed:
        later = np.triu(np.ones((length, length), np.bool_), 1)
        mask = (later | (segments[:, :, None] != segments[:, None, :])).astype(np.uint8)
    else:
        if segments.max() > 0:
            raise TrainingError("rows of several texts came to a graph that was built without packing")
        mask = np.zeros((len(ids), 1, 1), np.uint8)  # not looked at
    shares = np.where(learned, np.float32(share), np.float32(0.0))
    return ids.reshape(-1), targets.reshape(-1), shares.reshape(-1), np.cos(angles), np.sin(angles), mask


def _padded(array: NDArray[np.int32], length: int, fill: int) -> NDArray[np.int32]:
    """(B, S) -> (B, length)."""
    if array.shape[1] > length:
        if not (array[:, length:] == fill).all():
            raise TrainingError(f"a row of {array.shape[1]} tokens exceeds max_length {length} of this graph")
        return array[:, :length]
    out = np.full((len(array), length), fill, np.int32)
    out[:, : array.shape[1]] = array
    return out


class AscendTrainStep:
    """A model on Ascend, its optimizer and where it stands; see ``train_step.TrainStep`` for the methods."""

    def __init__(
        self,
        spec: Spec,
        optimizer: OptimizerSpec,
        weights: Mapping[str, Array],
        length: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """``weights``: float32 by published and LoRA names; ``length``: tokens of every row, padding included.

        None takes the rows as they come, and compiles a graph for each length that does.
        """
        self.config, self.spec, self.optimizer, self.length = spec.config, spec, optimizer, length
        self._exchange: Exchange = exchange or Alone()
        self.model = (StagedModel if spec.layout.stages > 1 else TrainingModel)(spec)
        self.scale = LossScale(_start(optimizer, spec.compute), optimizer.loss_scale_window)
        trained = self.model.trainable_params()
        decays = tuple(
            optimizer.weight_decay if optimizer.decays(published_name(p.name)[0]) else 0.0 for p in trained
        )
        self.graph = StepGraph(self.model, spec, decays, optimizer.clip_norm)
        self._steps = self._updates = 0
        for parameter in self.model.get_parameters():
            _fill(parameter, weights, spec.layout.model)

    def step(self, micro: Sequence[BatchLike], lr: float) -> StepResult:
        """One update from all batches together; TrainingError if there is nothing to learn."""
        own = float(sum(count_targets(batch) for batch in micro))
        # Devices that share the rows of one copy of the model count the same tokens.
        total = self._exchange.sums(own)[0] / (self.spec.layout.model * self.spec.layout.stages)
        if total < 1:
            raise TrainingError("nothing to learn in this step: every label of its batches is ignored")
        scaled, spec = self.scale.value, self.optimizer
        updates = self._updates + 1
        numbers = [
            spec.beta1,
            spec.beta2,
            spec.eps,
            1 - spec.beta1**updates,
            1 - spec.beta2**updates,
            lr,
            scaled,
        ]
        self.graph.numbers.set_data(Tensor(np.array(numbers, np.float32)))
        arrays = step_arrays(micro, self.config, self.length, scaled / total, self.spec.packed)
        loss, norm, _ = self.graph.compile_and_run(*map(Tensor.from_numpy, arrays))
        length = float(norm.asnumpy().reshape(-1)[0])
        overflow = not math.isfinite(length)
        self._steps += 1
        self._updates += not overflow
        self.scale.after(overflow)
        return StepResult(float(loss.asnumpy()) / scaled, length, int(total), overflow, scaled)

    def evaluate(self, batch: BatchLike) -> tuple[float, int]:
        """Sum of the token losses of a batch, and how many tokens; nothing is changed."""
        count = count_targets(batch)
        if not count:
            return 0.0, 0
        arrays = step_arrays([batch], self.config, self.length, 1.0, self.spec.packed)
        loss = self.model.compile_and_run(*map(Tensor.from_numpy, arrays))
        return float(loss.asnumpy()), count

    def trainable(self) -> dict[str, Array]:
        """Copies of the trained parameters by published name, in float32."""
        return _joined(self.graph.weights)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of everything the next step depends on; names and meaning as those of TrainStep."""
        out: dict[str, NDArray[Any]] = dict(self.trainable())
        for prefix, moments in ((FIRST, self.graph.first), (SECOND, self.graph.second)):
            out |= {prefix + name: value for name, value in _joined(moments, prefix).items()}
        out["step"], out["updates"] = np.array(self._steps, np.int64), np.array(self._updates, np.int64)
        out["loss_scale"] = np.array(self.scale.value, np.float64)
        out["loss_scale_good"] = np.array(self.scale.good, np.int64)
        return out

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what ``state`` returned. TrainingError if it is of another model or method."""
        own = self.state()
        wrong = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
        if wrong:
            raise TrainingError(
                f"the state does not fit what is trained: {len(wrong)} entries, e.g. {wrong[:3]}"
            )
        for prefix, kept in (
            ("", self.graph.weights),
            (FIRST, self.graph.first),
            (SECOND, self.graph.second),
        ):
            for parameter in kept:
                _fill(parameter, state, self.spec.layout.model, prefix)
        self._steps, self._updates = int(state["step"]), int(state["updates"])
        self.scale.value, self.scale.good = float(state["loss_scale"]), int(state["loss_scale_good"])


def _start(optimizer: OptimizerSpec, compute: str) -> float | None:
    from research.qwen.model.train_step import DEFAULT_SCALE

    return optimizer.loss_scale or (DEFAULT_SCALE if compute == "float16" else None)


def _fill(parameter: Parameter, arrays: Mapping[str, NDArray[Any]], ways: int, prefix: str = "") -> None:
    """Set a parameter from the published tensor it is, or is a band of."""
    name, band = published_name(parameter.name.removeprefix(prefix))
    value = np.asarray(arrays[prefix + name], np.float32)
    value = value if band is None else bands(value)[band]
    kind = str(parameter.dtype).lower()
    if kind != "float32":
        value = converted(value, "float32", kind)
    parameter.set_data(Tensor.from_numpy(np.array(value)))  # memory of its own: steps write into it


def _joined(parameters: Sequence[Parameter], prefix: str = "") -> dict[str, Array]:
    """Published names -> float32 arrays, bands put together again."""
    parts: dict[str, list[Array]] = {}
    for parameter in parameters:
        name, _ = published_name(parameter.name.removeprefix(prefix))
        parts.setdefault(name, []).append(parameter.astype(ms.float32).asnumpy())  # bands come in order
    return {
        name: np.concatenate(found) if len(found) > 1 else found[0].copy() for name, found in parts.items()
    }
