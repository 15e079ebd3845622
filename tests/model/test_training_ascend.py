"""The door to training on Ascend: the graph of a checkpoint through stand-in operators, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.qwen.errors import ConfigError, KernelError
from research.qwen.model.open_ascend import open_ascend
from research.qwen.model.train_step import open_training
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from research.qwen.model.training_weights import training_weights
from tests.fixtures_util import model_folder
from tests.gptq_fixtures import gptq_folder
from tests.kernels.ascend_train_standins import train_standins
from tests.model.training_cases import rows_of, texts

pytestmark = pytest.mark.mindspore
LORA = MethodSpec("lora", 4, 8.0, 0.0, ("attention",), ("lm_head",))


def opened(method, folder=None, dtype="float32"):
    weights = training_weights(folder or model_folder("st_new_bf16"), None, method, "reference", 0)
    return open_ascend(weights, method, OptimizerSpec(), dtype, fused=train_standins("float32"))


def test_adapters_beside_bfloat16_weights_make_the_steps_of_the_cpu():
    ascend, plain = opened(LORA), open_training(model_folder("st_new_bf16"), method=LORA)
    batch = rows_of(texts((9, 14), plain.config.vocab_size))
    for _ in range(2):
        got, want = ascend.step([batch], 1e-2), plain.step([batch], 1e-2)
        assert abs(got.loss - want.loss) < 1e-4 and got.tokens == want.tokens
    assert set(ascend.trainable()) == set(plain.trainable())
    for name, value in ascend.trainable().items():
        assert np.abs(value - plain.trainable()[name]).max() < 2e-4, name


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


def test_dropout_that_is_not_there_is_told(caplog):
    opened(dataclasses.replace(LORA, dropout=0.05))
    assert "lora_dropout 0.05 is taken as 0" in caplog.text
