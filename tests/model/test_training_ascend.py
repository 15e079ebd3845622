"""The door to training on Ascend: the graph of a checkpoint through stand-in operators, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.qwen.errors import ConfigError, KernelError
from research.qwen.kernels.parallel_layout import ParallelLayout
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


def opened(method, folder=None, dtype="float32", recompute=False):
    fused = train_standins("float32")
    return open_ascend(loaded(method, folder), method, OptimizerSpec(), dtype, recompute, fused=fused)


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
        ({"modules_to_save": ("ln_f",)}, "float16", "wte and lm_head"),
        ({}, "int8", "float16 or bfloat16"),
    ],
)
def test_what_its_graph_has_not(changes, dtype, message):
    with pytest.raises(ConfigError, match=message):
        opened(dataclasses.replace(LORA, **changes), dtype=dtype)


@pytest.mark.parametrize("case", ["int8", "int4", "gptq int4_desc_act", "gptq int4_asym_g64"])
def test_steps_beside_quantised_matrices(case):
    """Q-LoRA as on the CPU: losses, norms and adapters of two steps; matrices stay packed, and are widened twice."""
    gptq = case.startswith("gptq ")
    folder = gptq_folder(case.removeprefix("gptq ")) if gptq else None
    base = "as stored" if gptq else case
    method = MethodSpec("qlora", 4, 8.0, 0.0, ("attn.c_proj", "w1"), base=base)
    plain = open_training(folder or model_folder("st_new_bf16"), method=method)
    for name, value in plain.trainable().items():
        if name.endswith("lora_B.weight"):
            value[:] = np.random.default_rng(1).normal(0, 0.05, value.shape)
    step = opened(method, folder, recompute=gptq)
    batch = rows_of(texts((9, 14), plain.config.vocab_size))
    for _ in range(2):
        result, other = step.step([batch], 1e-2), plain.step([batch], 1e-2)
        assert abs(result.loss - other.loss) < 1e-4 and abs(result.grad_norm / other.grad_norm - 1) < 1e-4
    for name, value in step.trainable().items():
        assert np.abs(value - plain.trainable()[name]).max() < 2e-4, name
    kept = {p.name: p for p in step.model.get_parameters()}
    for name, stored in plain.model.frozen.items():
        if stored.packing is not None:
            assert kept[name].asnumpy().dtype == np.int8
            filled = stored.k + 128  # rows are filled up to whole groups
            assert kept[name].size * 8 <= stored.n * filled * stored.packing.scheme.bits


def test_quantised_matrices_are_for_one_device():
    method = MethodSpec("qlora", 4, 8.0, 0.0, ("w1",), base="int4")
    weights = loaded(method)
    with pytest.raises(ConfigError, match="one Ascend device only"):
        open_ascend(weights, method, OptimizerSpec(), "float16", layout=ParallelLayout(data=2))
