"""One optimizer step over several batches, with everything a bit-identical resume needs. NumPy in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.interrupts import held
from research.qwen.model.optimizer import AdamW
from research.qwen.model.stepping import FIRST, SECOND, Alone, Exchange, LossScale, StepResult
from research.qwen.model.training import Gradients, TrainingModel
from research.qwen.model.training_rows import BatchLike, count_targets, flatten

Array = NDArray[np.float32]


class TrainStep:
    """A model, its optimizer and where it stands."""

    def __init__(
        self,
        config: QwenConfig,
        model: TrainingModel,
        parameters: Mapping[str, Array],
        optimizer: AdamW,
        scale: LossScale,
        exchange: Exchange | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.scale = config, model, optimizer, scale
        self._parameters = parameters
        self._exchange: Exchange = exchange or Alone()
        self._steps = 0

    def step(self, micro: Sequence[BatchLike], lr: float) -> StepResult:
        """One update from all batches together: the gradient of the mean loss over every token they learn from.

        Raises TrainingError if there is no such token.
        """
        with held():
            loss, tokens, gradients = self.gradients(micro)
            scaled = self.scale.value
            norm = self.optimizer.norm(gradients) / scaled
            overflow = not math.isfinite(norm)
            self._steps += 1
            self.scale.after(overflow)
            if not overflow:
                self.optimizer.apply(gradients, lr, norm, 1.0 / scaled)
        return StepResult(loss, norm, tokens, overflow, scaled)

    def gradients(self, micro: Sequence[BatchLike]) -> tuple[float, int, dict[str, Array]]:
        """Mean loss, tokens learned from, and the gradients by name, times the loss scale; nothing is changed."""
        own = [count_targets(batch) for batch in micro]
        (total,) = self._exchange.sums(float(sum(own)))
        if total < 1:
            raise TrainingError("nothing to learn in this step: every label of its batches is ignored")
        native = self.model.way.optimizer
        sums, loss = Gradients(native.add) if native else Gradients(), 0.0
        for i, (batch, count) in enumerate(zip(micro, own, strict=True)):
            if count:
                number = self._exchange.rank * len(micro) + i
                rows = flatten(batch, self.config)
                loss += self.model.accumulate(rows, self.scale.value / total, sums, self._steps, number)
        gradients = sums.complete(self._parameters)
        self._exchange.add(gradients)
        (loss,) = self._exchange.sums(loss)
        return loss / total, int(total), gradients

    def evaluate(self, batch: BatchLike) -> tuple[float, int]:
        """Sum of the token losses of a batch without dropout, and how many tokens; nothing is changed."""
        if not count_targets(batch):
            return 0.0, 0
        with held():
            rows = flatten(batch, self.config)
            return self.model.loss(rows), rows.tokens

    def logits(self, batch: BatchLike) -> Array:
        """(B, S, vocab_size), zeros at padding: for checks on small models."""
        with held():
            rows = flatten(batch, self.config)
            out = np.zeros((batch.ids.size, self.config.vocab_size), np.float32)
            out[rows.places] = self.model.logits(rows)
        return out.reshape(*batch.ids.shape, -1)

    def trainable(self) -> dict[str, Array]:
        """The trained parameters themselves by name; copy what has to outlive the next step."""
        return dict(self._parameters)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything the next step depends on, as views of live memory: write or copy it before the next step."""
        out: dict[str, NDArray[Any]] = dict(self._parameters)
        out |= {FIRST + name: value for name, value in self.optimizer.first.items()}
        out |= {SECOND + name: value for name, value in self.optimizer.second.items()}
        out["step"] = np.array(self._steps, np.int64)
        out["updates"] = np.array(self.optimizer.updates, np.int64)
        out["loss_scale"] = np.array(self.scale.value, np.float64)
        out["loss_scale_good"] = np.array(self.scale.good, np.int64)
        return out

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what ``state`` returned. TrainingError if it is of another model or method."""
        own = self.state()
        missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or extra:
            raise TrainingError(
                f"the state does not fit what is trained: {len(missing)} entries missing {missing[:3]}, "
                f"{len(extra)} unknown {extra[:3]}"
            )
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise TrainingError(f"state {name} has shape {state[name].shape}, expected {value.shape}")
            if value.ndim:
                np.copyto(value, state[name])
        self._steps, self.optimizer.updates = int(state["step"]), int(state["updates"])
        self.scale.value, self.scale.good = float(state["loss_scale"]), int(state["loss_scale_good"])
