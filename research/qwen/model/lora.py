"""LoRA (https://arxiv.org/abs/2106.09685): names, first values and dropout of the adapters. Imports no MindSpore.

Everything random depends only on numbers that a checkpoint holds, so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.kernels.dropout_words import CHANCES, chances
from research.qwen.model.training_specs import MATRICES, MethodSpec
from research.qwen.weights.quantised import matrices


def lora_shapes(config: QwenConfig, method: MethodSpec) -> dict[str, tuple[int, int]]:
    """Name -> shape: ``X.lora_A.weight`` (rank, n_in) and ``X.lora_B.weight`` (n_out, rank), layer by layer.

    TrainingError if the rank is larger than a matrix.
    """
    shapes: dict[str, tuple[int, int]] = {}
    sizes = matrices(config)
    for layer in range(config.num_layers):
        for matrix in method.matrices():
            name = f"transformer.h.{layer}.{matrix}"
            n, k = sizes[name]
            if method.rank > min(n, k):
                raise TrainingError(
                    f"LoRA rank {method.rank} is larger than {name} ({n} x {k}); choose a smaller one"
                )
            shapes[f"{name}.lora_A.weight"] = (method.rank, k)
            shapes[f"{name}.lora_B.weight"] = (n, method.rank)
    return shapes


def first_values(config: QwenConfig, method: MethodSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """A uniform in +-1 / sqrt(n_in) (Kaiming's bound for a slope of sqrt(5)), B zero: the adapter begins as nothing."""
    out: dict[str, NDArray[np.float32]] = {}
    for name, shape in lora_shapes(config, method).items():
        if name.endswith("lora_B.weight"):
            out[name] = np.zeros(shape, np.float32)
            continue
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        bound = 1.0 / math.sqrt(shape[1])
        out[name] = generator.uniform(-bound, bound, shape).astype(np.float32)
    return out


class Dropout:
    """Which inputs each adapter sees in one pass; the same for the same (seed, step, micro batch, module).

    On Ascend masks are made in the graph, by another rule: ``kernels.dropout_words``.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self._seed = rate, seed

    @property
    def keep(self) -> float:
        """Probability that an input stays, a multiple of 1 / 65536."""
        return self._limit / CHANCES

    @property
    def _limit(self) -> int:
        return chances(self.rate)

    def kept(
        self, step: int, micro: int, layer: int, matrix: str, shape: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """(T, n_in) bool."""
        bits = np.random.SFC64([self._seed, step, micro, layer, MATRICES.index(matrix)])
        count = shape[0] * shape[1]
        pieces: NDArray[np.uint16] = bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return (
            (pieces < np.uint16(self._limit)).reshape(shape)
            if self._limit < CHANCES
            else np.ones(shape, np.bool_)
        )
