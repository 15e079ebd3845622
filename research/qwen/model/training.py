"""A model in training on the host's memory: loss and gradients, one layer after another through the same two graphs.

Weights, gradients and optimizer state are NumPy arrays; graphs see their memory without a copy, and an update in place
is seen by the next run. Gradients of several batches are summed as each layer gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.kernels import training as cells
from research.qwen.kernels.native_unpack import numpy_unpack
from research.qwen.kernels.training_ways import Way, reference_way
from research.qwen.model.frozen import FrozenMatrices
from research.qwen.model.lora import Dropout
from research.qwen.model.training_rows import Rows
from research.qwen.model.training_specs import MethodSpec
from research.qwen.weights.names import expected

Array = NDArray[np.float32]
WTE, LN_F, HEAD = "transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"


class Graph:
    """A cell, compiled at its first use whatever mode the caller left MindSpore in.

    ``compile_and_run`` asks all cells whether it must compile; the executor behind it does not. It is private to
    MindSpore (2.9.0, pinned).
    """

    def __init__(self, cell: nn.Cell, signature: Sequence[Tensor]) -> None:
        self._cell, self._compiled = cell, False
        cell.set_train(False)
        cell.set_inputs(*signature)

    def __call__(self, *inputs: Tensor) -> Any:
        if self._compiled:
            return _cell_graph_executor(self._cell, *inputs, phase=self._cell.phase)
        out = self._cell.compile_and_run(*inputs)
        self._compiled = True
        return out


class Gradients:
    """Sums of gradients by parameter name. The first array of a parameter is taken over, not copied.

    ``plus(x, y)`` adds y to x in place.
    """

    def __init__(self, plus: Callable[[Array, Array], object] = operator.iadd) -> None:
        self.arrays: dict[str, Array] = {}
        self._plus = plus

    def add(self, name: str, value: Array) -> None:
        """Add a gradient; the array belongs to this object from now on."""
        have = self.arrays.get(name)
        if have is None:
            self.arrays[name] = value
        else:
            self._plus(have, value)

    def add_rows(self, name: str, shape: tuple[int, ...], rows: NDArray[np.int32], values: Array) -> None:
        """Add values (R, H) to the rows (R,) of a gradient; a row may be named twice."""
        if name not in self.arrays:
            self.arrays[name] = np.zeros(shape, np.float32)
        np.add.at(self.arrays[name], rows, values)

    def complete(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """A gradient of every parameter in their order, zeros where nothing came."""
        for name, value in parameters.items():
            if name not in self.arrays:
                self.arrays[name] = np.zeros_like(value)
        return {name: self.arrays[name] for name in parameters}


class TrainingModel:
    """Loss and gradients of a model whose weights lie in ``weights`` (published and LoRA names, float32), or in
    ``frozen`` as they are stored.
    """

    def __init__(
        self,
        config: QwenConfig,
        method: MethodSpec,
        weights: Mapping[str, Array],
        trained: Sequence[str],
        seed: int = 0,
        recompute: bool = False,
        frozen: FrozenMatrices | None = None,
        way: Way | None = None,
    ) -> None:
        self.config, self.weights, self.recompute = config, weights, recompute
        self.trained = frozenset(trained)
        self.dropout = Dropout(0.0 if method.kind == "full" else method.dropout, seed)
        self.plan = layer_plan(config, method, self.dropout.keep)
        self._quiet = layer_plan(config, method, 1.0)
        self.frozen = frozen or FrozenMatrices(numpy_unpack)
        self._tensors = {name: Tensor.from_numpy(array) for name, array in weights.items()}
        self.way = way or reference_way()
        self._graphs: dict[str, Graph] = {}

    def accumulate(
        self, rows: Rows, scale: float, gradients: Gradients, step: int = 0, micro: int = 0
    ) -> float:
        """Sum of the losses of the targets; adds the gradients of ``scale`` times that sum.

        ``step`` and ``micro`` number the pass for dropout.
        """
        tensors = self._step(rows)
        masks = self._masks(step, micro, rows)
        forward = self._graph("forward", self.plan)
        x = Tensor.from_numpy(self._embed(rows.ids))
        kept: list[tuple[Tensor, ...]] = []
        for layer in range(self.config.num_layers):
            out = forward(x, *tensors, *self._inputs(layer, masks))
            kept.append((x,) if self.recompute else (x, *out[1:]))
            x = out[0]
        del out
        loss, dx = self._head(x, rows, scale, gradients)
        del x
        backward = self._graph("backward", self.plan)
        for layer in reversed(range(self.config.num_layers)):
            inputs = self._inputs(layer, masks)
            saved = kept.pop()
            if self.recompute:
                saved = (saved[0], *forward(saved[0], *tensors, *inputs)[1:])
            out = backward(Tensor.from_numpy(dx), *saved, *tensors, *inputs)
            del saved
            dx = out[0].asnumpy()
            for name, value in zip(self.plan.gradients, out[1:], strict=True):
                gradients.add(f"transformer.h.{layer}.{name}", value.asnumpy())
            del out
        if WTE in self.trained:
            gradients.add_rows(WTE, self.weights[WTE].shape, rows.ids, dx)
        return loss

    def loss(self, rows: Rows) -> float:
        """Sum of the losses of the targets, without dropout; keeps nothing."""
        x, total = self._hidden(rows), 0.0
        graph = self._graph("loss")
        for start in range(0, rows.tokens, self.way.head_rows):
            at = slice(start, start + self.way.head_rows)
            inputs = (x[rows.rows[at]], rows.targets[at])
            losses = graph(*map(Tensor.from_numpy, inputs), self._tensor(LN_F), self._tensor(HEAD))
            total += float(losses.asnumpy().sum(dtype=np.float64))
        return total

    def logits(self, rows: Rows) -> Array:
        """(T, vocab_size) of all tokens, without dropout: for checks on small models."""
        x = Tensor.from_numpy(self._hidden(rows))
        out: Array = self._graph("logits")(x, self._tensor(LN_F), self._tensor(HEAD)).asnumpy()
        return out

    def _hidden(self, rows: Rows) -> Array:
        tensors = self._step(rows)
        graph = self._graph("forward" if self.plan == self._quiet else "quiet", self._quiet)
        x = Tensor.from_numpy(self._embed(rows.ids))
        for layer in range(self.config.num_layers):
            x = graph(x, *tensors, *self._inputs(layer, {}))[0]
        out: Array = x.asnumpy()
        return out

    def _step(self, rows: Rows) -> list[Tensor]:
        return [Tensor.from_numpy(np.ascontiguousarray(a)) for a in self.way.step(rows)]

    def _embed(self, ids: NDArray[np.int32]) -> Array:
        return self.frozen.rows(WTE, ids) if WTE in self.frozen else self.weights[WTE][ids]

    def _head(self, x: Tensor, rows: Rows, scale: float, gradients: Gradients) -> tuple[float, Array]:
        """Loss, and its gradient with respect to x (T, H), in runs of rows."""
        values: Array = x.asnumpy()
        dx = np.zeros_like(values)
        graph, loss = self._graph("head"), 0.0
        weights = (self._tensor(LN_F), self._tensor(HEAD))
        factor = Tensor.from_numpy(np.full((1, 1), scale, np.float32))
        run = self.way.head_rows
        for start in range(0, rows.tokens, run):
            at, targets = rows.rows[start : start + run], rows.targets[start : start + run]
            out = graph(Tensor.from_numpy(values[at]), Tensor.from_numpy(targets), factor, *weights)
            loss += float(out[0].asnumpy().sum(dtype=np.float64))
            dx[at] = out[1].asnumpy()
            if LN_F in self.trained:
                gradients.add(LN_F, out[2].asnumpy())
            if HEAD in self.trained:
                gradients.add(HEAD, out[3].asnumpy())
            if len(out) > 4:
                np.subtract.at(gradients.arrays[HEAD], targets, out[4].asnumpy())
        return loss, dx

    def _masks(self, step: int, micro: int, rows: Rows) -> dict[str, Callable[[int], NDArray[np.bool_]]]:
        """Matrix -> what makes its dropout mask for a layer."""
        if self.dropout.keep == 1.0:
            return {}
        sizes = expected(self.config)

        def make(matrix: str) -> Callable[[int], NDArray[np.bool_]]:
            shape = (len(rows.ids), sizes[f"transformer.h.0.{matrix}.weight"][1])
            return lambda layer: self.dropout.kept(step, micro, layer, matrix, shape)

        named = zip(cells.MATRICES, self.plan.projections, strict=True)
        return {matrix: make(matrix) for matrix, projection in named if "keep" in projection.inputs}

    def _inputs(self, layer: int, masks: Mapping[str, Callable[[int], NDArray[np.bool_]]]) -> list[Tensor]:
        """Weights (and masks) of a layer in the order of its graphs; without masks those of the quiet graph."""
        plan = self.plan if masks else self._quiet
        out = []
        for name in plan.inputs:
            if name.endswith(".keep"):
                out.append(Tensor.from_numpy(masks[name.removesuffix(".keep")](layer)))
            else:
                out.append(self._tensor(f"transformer.h.{layer}.{name}"))
        return out

    def _tensor(self, name: str) -> Tensor:
        found = self._tensors.get(name)
        return found if found is not None else self.frozen.tensor(name)

    def _graph(self, kind: str, plan: cells.LayerPlan | None = None) -> Graph:
        if kind not in self._graphs:
            cell, signature = self._build(kind, plan)
            self._graphs[kind] = Graph(cell, signature)
        return self._graphs[kind]

    def _build(self, kind: str, plan: cells.LayerPlan | None) -> tuple[nn.Cell, list[Tensor]]:
        config = self.config
        hidden = _any([None, config.hidden_size])
        ids = _any([None], ms.int32)
        top = [_any([config.hidden_size]), _any([config.vocab_size, config.hidden_size])]
        if plan is not None:
            return self._layer(kind, plan, hidden)
        if kind == "head":
            cell = self.way.head(config.layer_norm_epsilon, HEAD in self.trained)
            return cell, [hidden, ids, _any([1, 1]), *top]
        if kind == "loss":
            return self.way.loss(config.layer_norm_epsilon), [hidden, ids, *top]
        return self.way.logits(config.layer_norm_epsilon), [hidden, *top]

    def _layer(self, kind: str, plan: cells.LayerPlan, hidden: Tensor) -> tuple[nn.Cell, list[Tensor]]:
        config, step = self.config, self.way.step_types(self.config)
        shapes = expected(config)
        weights = []
        for name in plan.inputs:
            matrix = name.removesuffix(".keep").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
            n, k = (*shapes[f"transformer.h.0.{matrix}.weight"], 0)[:2] if matrix != name else (0, 0)
            rank = plan.projections[cells.MATRICES.index(matrix)].rank if matrix != name else 0
            if name.endswith(".keep"):
                weights.append(_any([None, k], ms.bool_))
            elif name.endswith(".lora_A.weight"):
                weights.append(_any([rank, k]))
            elif name.endswith(".lora_B.weight"):
                weights.append(_any([n, rank]))
            else:
                weights.append(_any(list(shapes[f"transformer.h.0.{name}"])))
        if kind != "backward":
            return self.way.forward(plan), [hidden, *step, *weights]
        return self.way.backward(plan), [hidden, *self.way.kept_types(config), *step, *weights]


def layer_plan(config: QwenConfig, method: MethodSpec, keep: float) -> cells.LayerPlan:
    """What the graphs of a layer depend on for a method; ``keep`` is 1 - dropout."""
    full, adapted = method.kind == "full", method.matrices()
    projections = tuple(
        cells.Projection(
            bias=matrix == "attn.c_attn",
            trained=full,
            rank=method.rank if matrix in adapted else 0,
            scale=method.scale if matrix in adapted else 0.0,
            keep=keep if matrix in adapted else 1.0,
        )
        for matrix in cells.MATRICES
    )
    return cells.LayerPlan(config.num_heads, config.head_dim, config.layer_norm_epsilon, full, projections)


def _any(shape: list[int | None], dtype: Any = ms.float32) -> Tensor:
    known = [size for size in shape if size is not None]
    if len(known) < len(shape):
        return Tensor(shape=shape, dtype=dtype)
    return Tensor.from_numpy(np.empty(known, np.float32))  # never touched, so it takes no memory
