"""The door to training on Ascend: the graph of a checkpoint through stand-in operators, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.qwen.errors import ConfigError, KernelError
from research.qwen.model.open_ascend import open_ascend
from research.qwen.model.open_training import open_training
from research.qwen.model.training import TrainingModel
from research.qwen.model.training_rows import flatten
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from research.qwen.model.training_weights import training_weights
from tests.fixtures_util import model_folder
from tests.gptq_fixtures import gptq_folder
from tests.kernels.ascend_train_standins import train_standins
from tests.model.training_cases import rows_of, texts

pytestmark = pytest.mark.mindspore
LORA = MethodSpec("lora", 4, 8.0, 0.0, ("attention",), ("lm_head",))


def loaded(method, folder=None):
    """The weights of a checkpoint, no half of the adapter zero."""
    weights = training_weights(folder or model_folder("st_new_bf16"), None, method, "reference", 0)
    for name in weights.trained:
        if name.endswith("lora_B.weight"):
            weights.arrays[name][:] = np.random.default_rng(1).normal(0, 0.05, weights.arrays[name].shape)
    return weights


def opened(method, folder=None, dtype="float32"):
    return open_ascend(
        loaded(method, folder), method, OptimizerSpec(), dtype, fused=train_standins("float32")
    )


def test_the_weights_arrive_frozen_and_trained():
    """What the graph computes is tested beside its cells; here only that all weights are in their places."""
    weights = loaded(LORA)
    plain = TrainingModel(weights.config, LORA, weights.arrays, weights.trained, frozen=weights.frozen)
    ascend = opened(LORA)
    batch = rows_of(texts((9, 14), weights.config.vocab_size))
    total, tokens = ascend.evaluate(batch)
    assert abs(total / tokens - plain.loss(flatten(batch, weights.config)) / tokens) < 1e-4
    assert list(ascend.trainable()) and set(ascend.trainable()) == set(weights.trained)
    for name, value in ascend.trainable().items():
        np.testing.assert_array_equal(value, weights.arrays[name], err_msg=name)


def test_without_a_device_it_says_why():
    with pytest.raises(KernelError, match="finds no Ascend device.*use device cpu"):
        open_training(model_folder("st_new_bf16"), method=LORA, compute_dtype="float16", backend="ascend")


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"kind": "qlora"}, "float16", "quantised weights"),
        ({"modules_to_save": ("ln_f",)}, "float16", "wte and lm_head"),
        ({}, "int8", "float16 or bfloat16"),
    ],
)
def test_what_its_graph_has_not(changes, dtype, message):
    with pytest.raises(ConfigError, match=message):
        opened(dataclasses.replace(LORA, **changes), dtype=dtype)


def test_quantised_checkpoints_are_refused():
    with pytest.raises(ConfigError, match="quantised weights"):
        opened(LORA, gptq_folder("int4"), "float16")
