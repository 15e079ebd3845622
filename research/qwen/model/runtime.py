"""ids in, logits out: one compiled graph behind the LanguageModel protocol of the decoding loop."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.decode.loop import Chunk
from research.qwen.errors import PromptError, RequestError
from research.qwen.interrupts import held
from research.qwen.kernels.api import CacheSpec, Kernels, StepView
from research.qwen.kernels.lora import Updates, row_adapters
from research.qwen.model.loading import TensorSource, load_weights, storage_format
from research.qwen.model.qwen import HiddenStates, QwenModel
from research.qwen.rope import ntk_alpha


class Graph:
    """A cell that maps ids, rows and step tensors to float32 rows, compiled once for each form of step."""

    def __init__(self, cell: nn.Cell, config: QwenConfig, kernels: Kernels, cache: CacheSpec):
        self.cell, self._context = cell, (kernels, config, cache)
        cell.set_train(False)
        self._key: str | None = None
        self._compiled: str | None = None

    def declare(self, key: str) -> None:
        """Set the inputs of the graph ``key``, where a backend has more than one."""
        if key != self._key:
            kernels, config, cache = self._context
            ids = Tensor(shape=[None], dtype=ms.int32)
            self.cell.set_inputs(ids, ids, *kernels.step_signature(config, cache, key))
            self._key = key

    def run(self, key: str, *inputs: Tensor) -> Tensor:
        """Run the graph, compiled at its first use whatever mode the caller left MindSpore in.

        ``compile_and_run`` walks over all cells of the model to ask whether it must compile, which takes longer than
        running a small graph. The executor behind it is private to MindSpore (2.9.0, pinned).
        """
        self.declare(key)
        if self._compiled == key:
            return _cell_graph_executor(self.cell, *inputs, phase=self.cell.phase)
        out = self.cell.compile_and_run(*inputs)
        self._compiled = key
        return out


class Runtime:
    """A loaded model. ``forward`` is the only way in; it validates ids first, since an id outside the table would
    make every later graph call of the process fail."""

    def __init__(
        self,
        config: QwenConfig,
        kernels: Kernels,
        cache: CacheSpec,
        model: QwenModel,
        adapters: Sequence[str] = (),
    ):
        self.config, self.kernels, self.cache, self.model = config, kernels, cache, model
        self.adapters = tuple(adapters)
        self.vocab_size = config.vocab_size
        self.max_length = min(config.max_length, cache.tokens)
        self.num_blocks, self.block_size = cache.num_blocks, cache.block_size
        self._lock = threading.Lock()
        self.graph = Graph(model, config, kernels, cache)
        self._hidden: Graph | None = None

    @classmethod
    def load(
        cls,
        config: QwenConfig,
        source: TensorSource,
        kernels: Kernels,
        cache: CacheSpec,
        adapters: Mapping[str, Updates] | None = None,
    ) -> Runtime:
        """Build the model for a checkpoint and set its weights; ``adapters`` by name, see ``Chunk.adapter``."""
        model = QwenModel(config, kernels, cache, lambda name: storage_format(source, name))
        load_weights(model, source, kernels, config)
        if adapters:
            model.transformer.adapt(kernels, list(adapters.values()))
        return cls(config, kernels, cache, model, tuple(adapters or ()))

    @property
    def compilations(self) -> int:
        """How many graphs were compiled so far."""
        return len(self.model.compile_cache)

    def rope_alpha(self, prompt_length: int) -> float:
        """NTK factor of a sequence whose prompt has this many tokens."""
        return ntk_alpha(prompt_length, self.config)

    def forward(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """One pass over runs of tokens -> (sum of chunk.logits, vocab_size) float32, rows in chunk order.

        Raises PromptError for an id outside the vocabulary, RequestError for an adapter that is not loaded.
        """
        return self._run(self.graph, chunks)

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Like ``forward``, but what the head would see: (sum of chunk.logits, hidden_size) float32, after ``ln_f``.

        Raises PromptError for an id outside the vocabulary. The first call compiles a graph of its own.
        """
        if self._hidden is None:
            self._hidden = Graph(HiddenStates(self.model), self.config, self.kernels, self.cache)
        return self._run(self._hidden, chunks)

    def _numbers(self, chunks: Sequence[Chunk]) -> list[int]:
        """Number of each chunk's adapter, -1 for none; an empty list where no chunk has one."""
        if not any(chunk.adapter for chunk in chunks):
            return []
        unknown = [chunk.adapter for chunk in chunks if chunk.adapter not in ("", *self.adapters)]
        if unknown:
            raise RequestError(
                f"there is no adapter {unknown[0]!r}; loaded: {', '.join(self.adapters) or 'none'}"
            )
        return [self.adapters.index(chunk.adapter) if chunk.adapter else -1 for chunk in chunks]

    def _run(self, graph: Graph, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        ids = np.concatenate([np.asarray(chunk.ids, np.int64) for chunk in chunks])
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.vocab_size} rows")
        view = StepView(
            starts=[chunk.start for chunk in chunks],
            q_lens=[len(chunk.ids) for chunk in chunks],
            alphas=[chunk.alpha for chunk in chunks],
            block_tables=[chunk.blocks for chunk in chunks],
            adapters=self._numbers(chunks),
        )
        ends = np.cumsum(view.q_lens)
        wanted = [np.arange(end - chunk.logits, end) for end, chunk in zip(ends, chunks, strict=True)]
        rows = np.concatenate(wanted).astype(np.int32)
        # A graph without output rows is not worth its own case.
        asked = rows if rows.size else np.zeros(1, np.int32)
        step = self.kernels.make_step(view, self.config, self.cache)
        with self._lock, held():
            if self.model.transformer.fused is not None:
                self.model.transformer.fused.refresh(row_adapters(view))
            inputs = (Tensor.from_numpy(ids.astype(np.int32)), Tensor.from_numpy(asked), *step)
            out = graph.run(self.kernels.graph_key(view), *inputs)
        return np.asarray(out.asnumpy(), np.float32)[: rows.size]
