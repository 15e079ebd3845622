"""ids in, logits out: one compiled graph behind the LanguageModel protocol of the decoding loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.graph.api import _cell_graph_executor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.decode.loop import Chunk
from research.qwen.errors import PromptError
from research.qwen.interrupts import held
from research.qwen.kernels.api import ONE_GRAPH, CacheSpec, Kernels, StepView
from research.qwen.model.loading import TensorSource, load_weights, storage_format
from research.qwen.model.qwen import QwenModel
from research.qwen.rope import ntk_alpha


class Runtime:
    """A loaded model. ``forward`` is the only way in; it validates ids first, since an id outside the table would
    make every later graph call of the process fail."""

    def __init__(self, config: QwenConfig, kernels: Kernels, cache: CacheSpec, model: QwenModel):
        self.config, self.kernels, self.cache, self.model = config, kernels, cache, model
        self.vocab_size = config.vocab_size
        self.max_length = min(config.max_length, cache.tokens)
        self.num_blocks, self.block_size = cache.num_blocks, cache.block_size
        self._lock = threading.Lock()
        model.set_train(False)
        ids = Tensor(shape=[None], dtype=ms.int32)
        model.set_inputs(ids, ids, *kernels.step_signature(config, cache))
        self._graph = ONE_GRAPH
        self._compiled: str | None = None

    @classmethod
    def load(cls, config: QwenConfig, source: TensorSource, kernels: Kernels, cache: CacheSpec) -> Runtime:
        """Build the model for a checkpoint and set its weights."""
        model = QwenModel(config, kernels, cache, lambda name: storage_format(source, name))
        load_weights(model, source, kernels, config)
        return cls(config, kernels, cache, model)

    @property
    def compilations(self) -> int:
        """How many graphs were compiled so far."""
        return len(self.model.compile_cache)

    def rope_alpha(self, prompt_length: int) -> float:
        """NTK factor of a sequence whose prompt has this many tokens."""
        return ntk_alpha(prompt_length, self.config)

    def forward(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """One pass over runs of tokens -> (sum of chunk.logits, vocab_size) float32, rows in chunk order.

        Raises PromptError for an id outside the vocabulary.
        """
        ids = np.concatenate([np.asarray(chunk.ids, np.int64) for chunk in chunks])
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.vocab_size} rows")
        view = StepView(
            starts=[chunk.start for chunk in chunks],
            q_lens=[len(chunk.ids) for chunk in chunks],
            alphas=[chunk.alpha for chunk in chunks],
            block_tables=[chunk.blocks for chunk in chunks],
        )
        ends = np.cumsum(view.q_lens)
        wanted = [np.arange(end - chunk.logits, end) for end, chunk in zip(ends, chunks, strict=True)]
        rows = np.concatenate(wanted).astype(np.int32)
        # A graph without output rows is not worth its own case.
        asked = rows if rows.size else np.zeros(1, np.int32)
        logits = self._run(ids.astype(np.int32), asked, view)
        return logits[: rows.size]

    def _select(self, key: str) -> None:
        """Declare the inputs of another graph, where a backend has more than one."""
        if key != self._graph:
            ids = Tensor(shape=[None], dtype=ms.int32)
            self.model.set_inputs(ids, ids, *self.kernels.step_signature(self.config, self.cache, key))
            self._graph = key

    def _run(self, ids: NDArray[np.int32], rows: NDArray[np.int32], view: StepView) -> NDArray[np.float32]:
        step = self.kernels.make_step(view, self.config, self.cache)
        with self._lock, held():
            if self.model.transformer.fused is not None:
                self.model.transformer.fused.refresh()
            self._select(self.kernels.graph_key(view))
            out = self._call(Tensor.from_numpy(ids), Tensor.from_numpy(rows), *step)
        return np.asarray(out.asnumpy(), np.float32)

    def _call(self, *inputs: Tensor) -> Tensor:
        """Run the graph, compiled at its first use whatever mode the caller left MindSpore in.

        ``compile_and_run`` walks over all cells of the model to ask whether it must compile, which takes longer than
        running a small graph. The executor behind it is private to MindSpore (2.9.0, pinned).
        """
        if self._compiled == self._graph:
            return _cell_graph_executor(self.model, *inputs, phase=self.model.phase)
        out = self.model.compile_and_run(*inputs)
        self._compiled = self._graph
        return out
