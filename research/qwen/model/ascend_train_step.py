"""Training on Ascend: the host's side of the step graph, with the methods of a TrainStep.

Not run on an NPU by this project; docs/finetune.md says what is checked and how. Rows are padded to one length, since
graphs of fused operators are compiled for a shape.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.kernels.ascend_cells import converted
from research.qwen.kernels.ascend_train_graph import StepGraph, model_for
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.dropout_words import quiet_words, token_words
from research.qwen.kernels.parallel_layout import bands, published_name
from research.qwen.model.ascend_shards import Shards
from research.qwen.model.stepping import FIRST, SECOND, Alone, Exchange, StepResult, loss_scale
from research.qwen.model.training_rows import IGNORED, BatchLike, count_targets
from research.qwen.model.training_specs import OptimizerSpec
from research.qwen.rope import inverse_frequencies

Array = NDArray[np.float32]


def step_arrays(
    batches: Sequence[BatchLike],
    config: QwenConfig,
    length: int | None,
    share: float,
    packed: bool,
    rows: int = 0,
) -> tuple[NDArray[Any], ...]:
    """ids, targets, shares (T,), cos, sin (B, S, d), mask (B, S, S) of the rows of all batches, S = ``length``.

    Without a ``length`` S is that of the longest batch. Where there are less than ``rows``, empty ones are added.

    A token predicts the next one of the same text; ``share`` is what it counts where its label is not ignored. Tokens
    with a negative segment come last in their row.
    TrainingError for a row beyond ``length`` or an id outside the vocabulary.
    """
    length = length or max(batch.ids.shape[1] for batch in batches)
    ids, labels, positions, segments = (
        _stacked([getattr(batch, name) for batch in batches], length, rows, fill)
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
    # Hidden tokens go to the end of their row, where nothing looks back at them; the others keep their positions.
    front = np.argsort(segments < 0, axis=1, kind="stable")
    ids, targets, positions, segments = (
        np.take_along_axis(array, front, axis=1) for array in (ids, targets, positions, segments)
    )
    learned = np.take_along_axis(learned, front, axis=1)
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


def _stacked(parts: Sequence[NDArray[np.int32]], length: int, rows: int, fill: int) -> NDArray[np.int32]:
    """Arrays (B, S) below one another as (at least ``rows``, length), ``fill`` where there is nothing."""
    out = np.full((max(rows, sum(len(part) for part in parts)), length), fill, np.int32)
    at = 0
    for part in parts:
        if (part[:, length:] != fill).any():
            raise TrainingError(f"a row of {part.shape[1]} tokens exceeds max_length {length} of this graph")
        out[at : at + len(part), : part.shape[1]] = part[:, :length]
        at += len(part)
    return out


class AscendTrainStep:
    """A model on Ascend, its optimizer and where it stands; see ``train_step.TrainStep`` for the methods.

    On several devices MindSpore divides the parameters when it first compiles the graph; until then ``_waiting`` holds
    what they will be set to. ``state`` and ``trainable`` are called by all processes then, which add up their parts.
    """

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
        self.model = model_for(spec)
        self.scale = loss_scale(optimizer, spec.compute)
        trained = self.model.trainable_params()
        decays = tuple(
            optimizer.weight_decay if optimizer.decays(published_name(p.name)[0]) else 0.0 for p in trained
        )
        self.graph = StepGraph(self.model, spec, decays, optimizer.clip_norm)
        self._steps = self._updates = 0
        self._rows = (
            0  # of a step; the last one of an epoch has fewer, and is filled up rather than compiled for
        )
        self._shapes = {p.name: tuple(p.shape) for p in self.graph.get_parameters()}
        self._shards = Shards(spec.layout, self._exchange.rank) if spec.layout.devices > 1 else None
        self._waiting: Mapping[str, NDArray[Any]] | None = None if self._shards is None else weights
        if self._shards is None:
            for parameter in self.model.get_parameters():
                _fill(parameter, _part(parameter.name, weights))

    def step(self, micro: Sequence[BatchLike], lr: float) -> StepResult:
        """One update from all batches together; TrainingError if there is nothing to learn."""
        own, layout = float(sum(count_targets(batch) for batch in micro)), self.spec.layout
        # Devices that share the rows of one copy of the model count the same tokens.
        total = self._exchange.sums(own)[0] / (layout.model * layout.stages)
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
        self._rows = max(self._rows, sum(len(batch.ids) for batch in micro))
        self._rows += -self._rows % layout.micro_batches
        arrays = step_arrays(micro, self.config, self.length, scaled / total, self.spec.packed, self._rows)
        inputs = [*map(Tensor.from_numpy, arrays), self._noise(len(arrays[0]))]
        self._divide(inputs)
        self.graph.numbers.set_data(Tensor(np.array(numbers, np.float32)))
        loss, norm, _ = self.graph.compile_and_run(*inputs)
        length, mean = float(norm.asnumpy().reshape(-1)[0]), float(loss.asnumpy()) / scaled
        if layout.stages > 1:  # only the last stage knows the loss
            last = self._exchange.rank == layout.devices - 1
            mean = self._exchange.sums(mean if last else 0.0)[0]
        overflow = not math.isfinite(length)
        self._steps += 1
        self._updates += not overflow
        self.scale.after(overflow)
        return StepResult(mean, length, int(total), overflow, scaled)

    def evaluate(self, batch: BatchLike) -> tuple[float, int]:
        """Sum of the token losses of a batch, and how many tokens; nothing is changed. On one device only."""
        if self._shards is not None:
            raise TrainingError(
                "on several Ascend devices there is no evaluation during training; leave eval_data out and evaluate "
                "the checkpoints"
            )
        count = count_targets(batch)
        if not count:
            return 0.0, 0
        arrays = step_arrays([batch], self.config, self.length, 1.0, self.spec.packed)
        quiet = Tensor.from_numpy(quiet_words(len(arrays[0])))
        loss = self.model.compile_and_run(*map(Tensor.from_numpy, arrays), quiet)
        return float(loss.asnumpy()), count

    def trainable(self) -> dict[str, Array]:
        """Copies of the trained parameters by published name, in float32."""
        return self._joined(self.graph.weights)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of everything the next step depends on; names and meaning as those of TrainStep."""
        out: dict[str, NDArray[Any]] = dict(self.trainable())
        for prefix, moments in ((FIRST, self.graph.first), (SECOND, self.graph.second)):
            out |= self._joined(moments, prefix)
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
        if self._waiting is not None:
            self._waiting = ChainMap(dict(state), self._waiting)  # type: ignore[arg-type]
        else:
            for parameter in (*self.graph.weights, *self.graph.first, *self.graph.second):
                self._set(parameter, state)
        self._steps, self._updates = int(state["step"]), int(state["updates"])
        self.scale.value, self.scale.good = float(state["loss_scale"]), int(state["loss_scale_good"])

    def _noise(self, tokens: int) -> Tensor:
        """The words of dropout of this step's tokens: those of a copy of the model, whichever devices share it."""
        spec = self.spec
        if not spec.dropout:
            return Tensor.from_numpy(quiet_words(tokens))
        copy = spec.layout.data_rank(self._exchange.rank)
        return Tensor.from_numpy(token_words(spec.seed, self._steps, copy, tokens, spec.dropout))

    def _divide(self, inputs: Sequence[Tensor]) -> None:
        """Compile for several devices, and give each parameter of this stage its part."""
        if self._shards is None or self._waiting is None:
            return
        self.graph.compile(*inputs)
        self._shards.found(self.graph.parameter_layout_dict)
        for parameter in self.graph.get_parameters():
            if parameter.name in self._shards.divisions:
                self._set(parameter, self._waiting)
        self._waiting = None

    def _set(self, parameter: Parameter, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Set a parameter, or this device's part of it; what ``arrays`` has not (moments at the start) is zero."""
        whole = _part(parameter.name, arrays, self._shapes[parameter.name])
        value = whole if self._shards is None else self._shards.own(parameter.name, whole)
        if value is not None:
            _fill(parameter, value)

    def _joined(self, parameters: Sequence[Parameter], prefix: str = "") -> dict[str, Array]:
        """Published names behind a prefix -> float32 arrays, shards and bands put together again."""
        parts: dict[str, list[Array]] = {}
        for parameter in parameters:
            name, _ = published_name(parameter.name.removeprefix(prefix))
            parts.setdefault(prefix + name, []).append(self._whole(parameter))  # bands come in order
        return {name: np.concatenate(found) for name, found in parts.items()}

    def _whole(self, parameter: Parameter) -> Array:
        name, shape = parameter.name, self._shapes[parameter.name]
        if self._waiting is not None:
            return _part(name, self._waiting, shape)
        if self._shards is None:
            return np.array(parameter.astype(ms.float32).asnumpy())
        here = name in self._shards.divisions
        part = parameter.astype(ms.float32).asnumpy() if here else None
        whole = self._shards.spread(name, shape, part)
        self._exchange.add({name: whole})
        return whole


def _part(name: str, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...] = ()) -> Array:
    """What a parameter is set to: the published tensor, its band of it, or zeros of ``shape`` where there is none."""
    prefix = next((one for one in (FIRST, SECOND) if name.startswith(one)), "")
    published, band = published_name(name.removeprefix(prefix))
    if shape and prefix + published not in arrays:
        return np.zeros(shape, np.float32)
    value = np.asarray(arrays[prefix + published])
    value = value if value.dtype.kind == "i" else value.astype(np.float32, copy=False)
    return value if band is None else bands(value)[band]


def _fill(parameter: Parameter, value: Array) -> None:
    """Set a parameter in its own dtype, in memory of its own: steps write into it."""
    kind = str(parameter.dtype).lower()
    own = kind == "float32" or value.dtype.kind == "i"
    converted_value = np.array(value) if own else converted(value, "float32", kind)
    parameter.set_data(Tensor.from_numpy(converted_value), slice_shape=True)
