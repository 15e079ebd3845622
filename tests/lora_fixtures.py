"""Adapters for tests: the golden one, and small ones made here for any model.

golden.npz holds every ``vocab_stride``-th column of the logits (the winners of whole rows as ``…_argmax``) and every
``row_stride``-th row of the merged matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from research.qwen.config import QwenConfig
from research.qwen.weights.adapter_config import AdapterConfig
from research.qwen.weights.adapters import Adapter, save_adapter
from research.qwen.weights.names import expected
from tests.fixtures_util import FIXTURES

GOLDEN = FIXTURES / "lora" / "default_targets"
TARGETS = ("c_attn", "c_proj", "w1", "w2")


def golden() -> dict[str, Any]:
    """Arrays of golden.npz of the golden adapter."""
    with np.load(GOLDEN / "golden.npz") as stored:
        return {name: stored[name] for name in stored.files}


def config_for(**changes: Any) -> AdapterConfig:
    """A plain config of rank 4."""
    return AdapterConfig(**{"rank": 4, "alpha": 8.0, "targets": TARGETS, **changes})


def random_arrays(
    model: QwenConfig, config: AdapterConfig, seed: int = 0, size: float = 0.1
) -> dict[str, np.ndarray]:
    """Random halves for every target of a model, and whole matrices for ``modules_to_save``."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in expected(model).items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and config.is_target(module):
            rank = config.module_rank(module)
            out[f"{module}.lora_A.weight"] = rng.normal(0, size, (rank, shape[1])).astype(np.float32)
            out[f"{module}.lora_B.weight"] = rng.normal(0, size, (shape[0], rank)).astype(np.float32)
        elif module.removeprefix("transformer.") in config.modules_to_save:
            out[name] = rng.normal(0, size, shape).astype(np.float32)
    return out


def random_adapter(model: QwenConfig, seed: int = 0, size: float = 0.1, **changes: Any) -> Adapter:
    """A checked adapter of random numbers for a model."""
    config = config_for(**changes)
    return Adapter.from_arrays(config, random_arrays(model, config, seed, size))


def saved_adapter(folder: Path, model: Path, seed: int = 0, size: float = 0.1, **changes: Any) -> Path:
    """The same as peft's folder, for the model in a folder."""
    save_adapter(folder, random_adapter(QwenConfig.from_folder(model), seed, size, **changes), "tiny")
    return folder
