"""What training is made of beside the graphs: settings, first values and dropout of adapters, AdamW, the loss scale."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError, TrainingError
from research.qwen.model.lora import Dropout, first_values, lora_shapes
from research.qwen.model.optimizer import BLOCK, AdamW
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec

CONFIG = QwenConfig(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, kv_channels=8
)
LORA = MethodSpec("lora", 4, 8.0, 0.05)


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [
        (("c_proj",), ("attn.c_proj", "mlp.c_proj")),
        (("attn.c_proj",), ("attn.c_proj",)),
        (("w2", "c_attn"), ("attn.c_attn", "mlp.w2")),
        (("attention",), ("attn.c_attn", "attn.c_proj")),
        (("mlp",), ("mlp.w1", "mlp.w2", "mlp.c_proj")),
        (("all",), ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")),
    ],
)
def test_targets_by_published_names(targets, matrices):
    method = MethodSpec("lora", 4, targets=targets)
    assert method.matrices() == matrices
    assert {name.split(".", 3)[3] for name in lora_shapes(CONFIG, method)} == {
        f"{matrix}.lora_{half}.weight" for matrix in matrices for half in "AB"
    }


def test_full_training_has_no_adapter():
    assert MethodSpec().matrices() == () and lora_shapes(CONFIG, MethodSpec()) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "prefix"}, "method must be one of"),
        ({"kind": "lora", "rank": 0}, "rank >= 1"),
        ({"kind": "lora", "dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"kind": "lora", "targets": ("wq",)}, "unknown target 'wq'"),
        ({"kind": "lora", "targets": ()}, "trains nothing"),
        ({"kind": "qlora", "modules_to_save": ("ln_1",)}, "unknown module to save 'ln_1'"),
    ],
)
def test_method_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        MethodSpec(**values)


def test_rank_larger_than_a_matrix():
    with pytest.raises(TrainingError, match="rank 17 is larger than transformer.h.0.attn.c_attn"):
        lora_shapes(CONFIG, MethodSpec("lora", 17))


def test_first_values_depend_on_the_seed_and_begin_as_nothing():
    first, again, other = (first_values(CONFIG, LORA, seed) for seed in (1, 1, 2))
    for name, value in first.items():
        assert value.dtype == np.float32 and value.shape == lora_shapes(CONFIG, LORA)[name]
        np.testing.assert_array_equal(value, again[name])
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.5 * bound < np.abs(value).max() <= bound
            assert not np.array_equal(value, other[name])
    assert len({value.tobytes() for name, value in first.items() if "lora_A" in name}) == 10


def test_dropout_depends_on_step_micro_batch_and_module_alone():
    dropout, shape = Dropout(0.25, seed=3), (40, 64)
    masks = {
        key: dropout.kept(*key, shape)
        for key in [
            (0, 0, 0, "mlp.w1"),
            (1, 0, 0, "mlp.w1"),
            (0, 1, 0, "mlp.w1"),
            (0, 0, 1, "mlp.w1"),
            (0, 0, 0, "mlp.w2"),
        ]
    }
    assert len({mask.tobytes() for mask in masks.values()}) == 5
    for key, mask in masks.items():
        np.testing.assert_array_equal(mask, Dropout(0.25, seed=3).kept(*key, shape))
        assert abs(mask.mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / mask.size)
    assert not np.array_equal(mask, Dropout(0.25, seed=4).kept(*key, shape))
    assert dropout.keep == 0.75 and Dropout(0.0, 0).keep == 1.0


def exact_adamw(spec: OptimizerSpec, weight, gradients, lr):
    """The formula in float64."""
    w, m, v = weight.astype(np.float64), 0.0, 0.0
    for step, g in enumerate(gradients, start=1):
        g = g.astype(np.float64)
        w = w * (1 - lr * spec.weight_decay)
        m = spec.beta1 * m + (1 - spec.beta1) * g
        v = spec.beta2 * v + (1 - spec.beta2) * g * g
        w -= lr * (m / (1 - spec.beta1**step)) / (np.sqrt(v / (1 - spec.beta2**step)) + spec.eps)
    return w


def test_adamw_is_the_formula_over_more_than_a_block():
    rng = np.random.default_rng(0)
    spec = OptimizerSpec(clip_norm=None, decay="all")
    weights = {"a.weight": rng.standard_normal((3, BLOCK // 2 + 5)).astype(np.float32)}
    start = weights["a.weight"].copy()
    gradients = [rng.standard_normal(start.shape).astype(np.float32) for _ in range(4)]
    adamw = AdamW(spec, weights)
    for gradient in gradients:
        adamw.apply({"a.weight": gradient.copy()}, lr=0.01, norm=1.0)
    np.testing.assert_allclose(
        weights["a.weight"], exact_adamw(spec, start, gradients, 0.01), rtol=0, atol=1e-6
    )


def test_biases_are_not_decayed_as_published_and_norms_are():
    weights = {name: np.ones(4, np.float32) for name in ("c_attn.bias", "ln_1.weight", "w1.weight")}
    adamw = AdamW(OptimizerSpec(weight_decay=0.5, clip_norm=None), weights)
    adamw.apply({name: np.zeros(4, np.float32) for name in weights}, lr=0.1, norm=1.0)
    assert weights["c_attn.bias"].tolist() == [1.0] * 4
    np.testing.assert_allclose(weights["ln_1.weight"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(weights["w1.weight"], 0.95, rtol=1e-6)


def test_gradients_are_shrunk_to_the_norm():
    """Adam is blind to the size of gradients, but not its second moment."""
    gradients = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([[4.0]], np.float32)}
    weights = {name: np.zeros_like(value) for name, value in gradients.items()}
    adamw = AdamW(OptimizerSpec(clip_norm=1.0), weights)
    assert adamw.norm(gradients) == 5.0
    adamw.apply({name: value.copy() for name, value in gradients.items()}, 0.1, 5.0)
    np.testing.assert_allclose(adamw.second["a"], [0.05 * 0.36, 0], rtol=1e-5)
    np.testing.assert_allclose(adamw.second["b"], [[0.05 * 0.64]], rtol=1e-5)
    before = adamw.second["b"].copy()
    adamw.apply({"a": np.zeros(2, np.float32), "b": np.full((1, 1), 0.5, np.float32)}, 0.1, 0.5)
    np.testing.assert_allclose(adamw.second["b"], 0.95 * before + 0.05 * 0.25, rtol=1e-5)


def test_norm_shows_what_is_not_finite():
    weights = {"a": np.zeros(3, np.float32)}
    for bad in (np.nan, np.inf):
        assert not math.isfinite(
            AdamW(OptimizerSpec(), weights).norm({"a": np.array([1, bad, 1], np.float32)})
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta1": 1.0}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"decay": "some"}, "decay must be"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"loss_scale": -1.0}, "loss_scale"),
    ],
)
def test_optimizer_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(OptimizerSpec(), **values)
