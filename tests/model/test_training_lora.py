"""LoRA and Q-LoRA: golden forward, gradients and steps; frozen matrices as they are stored; dropout and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from research.qwen.kernels.native_unpack import NativeUnpacker, numpy_unpack
from research.qwen.kernels.packing import packing
from research.qwen.model.frozen import FrozenMatrices, Stored
from research.qwen.model.open_training import open_training
from research.qwen.model.train_step import TrainStep
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from research.qwen.quant.schemes import dequantize_packed, quantize_packed
from research.qwen.weights.adapters import load_adapter
from tests.fixtures_util import model_folder as plain_folder
from tests.gptq_fixtures import SCHEMES, gptq_folder
from tests.lora_fixtures import GOLDEN as ADAPTER
from tests.lora_fixtures import golden as adapter_golden
from tests.model.golden import FULL
from tests.model.training_cases import (
    BACKENDS,
    golden,
    golden_batch,
    model_folder,
    relative,
    rows_of,
    texts,
)

pytestmark = pytest.mark.mindspore
DEFAULT = MethodSpec("lora", 8, 16.0, 0.0)
PLAIN = OptimizerSpec(clip_norm=None, decay="all")
OTHERS = {
    "attn_only_c_proj": MethodSpec("lora", 8, 16.0, 0.0, ("c_attn", "attn.c_proj", "w1", "w2")),
    "with_embeddings": dataclasses.replace(DEFAULT, modules_to_save=("wte", "lm_head")),
}


def with_adapter(method: MethodSpec, folder: Path, backend: str) -> TrainStep:
    """The golden model with an adapter in the place of the first values."""
    step = open_training(model_folder(), method=method, optimizer=PLAIN, backend=backend)
    parameters, adapter = step.trainable(), load_adapter(folder)
    found = {**adapter.tensors, **{name: stored.read() for name, stored in adapter.saved.items()}}
    assert set(parameters) == set(found)
    for name, value in found.items():
        np.copyto(parameters[name], value)
    return step


def check_logits(step: TrainStep, found: dict, stride: int) -> None:
    got = step.logits(rows_of([found["ids"].tolist()]))[0, :, ::stride]
    for name in ("merged_logits", "unmerged_logits"):
        assert np.abs(got - found[name]).max() < 3e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_adapter(backend):
    step, found = with_adapter(DEFAULT, ADAPTER, backend), adapter_golden()
    check_logits(step, found, int(found["vocab_stride"]))
    batch = golden_batch(golden())
    loss, _, gradients = step.gradients([batch])
    assert abs(loss - found["train_loss"]) < 1e-4
    wanted = [name for name in found if name.startswith("grad__")]
    assert len(wanted) == 10 and all("lora" in name for name in gradients)
    for name in wanted:
        assert relative(gradients[name.removeprefix("grad__")], found[name]) < 1e-4, name
    frozen = step.model.weights["lm_head.weight"].copy()
    results = [step.step([batch], 1e-3) for _ in range(5)]
    total, tokens = step.evaluate(batch)
    losses = [result.loss for result in results] + [total / tokens]
    np.testing.assert_allclose(losses, found["adamw_losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose([r.grad_norm for r in results], found["adamw_grad_norms"], rtol=1e-4)
    np.testing.assert_array_equal(step.model.weights["lm_head.weight"], frozen)


if FULL:  # these adapters are not among the small fixtures

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_golden_adapters(name):
        folder = Path(FULL) / "lora" / name
        with np.load(folder / "golden.npz") as stored:
            check_logits(with_adapter(OTHERS[name], folder, "reference"), dict(stored), 1)


@pytest.fixture(scope="module")
def half():
    """bfloat16 weights, one adapted matrix, dropout, and three modules trained whole."""
    method = MethodSpec("lora", 4, 8.0, 0.25, ("mlp.c_proj",), ("wte", "lm_head", "ln_f"))
    return open_training(plain_folder("st_new_bf16"), method=method, seed=5)


def test_modules_trained_whole_get_the_gradients_of_full_training(half):
    """As long as the adapter is nothing."""
    batch = rows_of(texts((9, 14), half.config.vocab_size))
    _, _, gradients = half.gradients([batch])
    full = open_training(plain_folder("st_new_bf16"))
    _, _, wanted = full.gradients([batch])
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.ln_f.weight"):
        assert relative(gradients[name], wanted[name]) < 1e-6
    assert set(gradients) == set(half.trainable())
    assert {name.split(".", 3)[-1] for name in gradients if ".h." in name} == {
        "mlp.c_proj.lora_A.weight",
        "mlp.c_proj.lora_B.weight",
    }


def test_frozen_weights_keep_their_stored_bits(half):
    config, frozen = half.config, dict(half.model.frozen.items())
    assert len(frozen) == 5 * config.num_layers  # the tables are trained here
    assert all(one.fmt == "bfloat16" and one.arrays["weight"].dtype == np.uint16 for one in frozen.values())
    half.gradients([rows_of(texts((5,), config.vocab_size))])
    elements = sum(one.n * one.k for one in frozen.values())
    one_layer = elements // config.num_layers
    assert half.model.frozen.nbytes == 2 * elements + 4 * one_layer


def test_dropout_changes_the_loss_by_step_and_not_the_evaluation(half):
    batch = rows_of(texts((9, 14), half.config.vocab_size))
    for name, value in half.trainable().items():
        if name.endswith("lora_B.weight"):
            value[...] = np.random.default_rng(0).standard_normal(value.shape) * 0.2
    state = {name: np.copy(value) for name, value in half.state().items()}
    total, tokens = half.evaluate(batch)
    losses = [half.step([batch], 0.0).loss for _ in range(2)]
    assert len({*losses, total / tokens}) == 3
    two = half.gradients([batch, batch])[0]  # the second micro batch has a mask of its own
    assert two != half.gradients([batch])[0]
    half.load_state(state)
    assert [half.step([batch], 0.0).loss for _ in range(2)] == losses


def test_dropout_of_the_native_way_is_the_same(half):
    batch = rows_of(texts((9, 14), half.config.vocab_size))
    method = MethodSpec("lora", 4, 8.0, 0.25, ("mlp.c_proj",), ("wte", "lm_head", "ln_f"))
    native = open_training(plain_folder("st_new_bf16"), method=method, seed=5, backend="cpu")
    native.load_state(half.state())
    (loss, _, gradients), (want, _, wanted) = native.gradients([batch]), half.gradients([batch])
    assert abs(loss - want) < 1e-5
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name]) < 1e-5, name


def dequantised(frozen: FrozenMatrices) -> FrozenMatrices:
    """The same matrices as float32, by NumPy."""
    out = FrozenMatrices(numpy_unpack)
    for name, stored in frozen.items():
        wide = np.empty((stored.n, stored.k), np.float32)
        stored.fill(wide, numpy_unpack)
        out.add(name, Stored(stored.n, stored.k, "float32", None, {"weight": wide}))
    return out


@pytest.mark.parametrize(
    "case", ["int8", "int4", *(f"gptq {name}" for name in ("int4_desc_act", "int4_asym_g64"))]
)
def test_packed_base_equals_its_float32_values(case):
    gptq = case.startswith("gptq ")
    variant = case.removeprefix("gptq ")
    method = MethodSpec("qlora", 4, 8.0, 0.0, ("all",), base="as stored" if gptq else case)
    step = open_training(
        gptq_folder(variant) if gptq else model_folder(),
        method=method,
        optimizer=PLAIN,
        backend="cpu" if case == "int4" else "reference",
    )
    for name, value in step.trainable().items():
        if name.endswith("lora_B.weight"):
            value[...] = np.random.default_rng(0).standard_normal(value.shape) * 0.05
    packed = {name: one for name, one in step.model.frozen.items() if one.packing}
    assert len(packed) == 5 * step.config.num_layers
    for one in packed.values():
        assert str(one.packing.scheme) == (SCHEMES[variant] if gptq else case)
        assert one.arrays["weight"].dtype == np.uint8
    batch = rows_of(texts((9, 14), step.config.vocab_size))
    loss, _, gradients = step.gradients([batch])
    packed_matrices, step.model.frozen = step.model.frozen, dequantised(step.model.frozen)
    want, _, wanted = step.gradients([batch])
    step.model.frozen = packed_matrices
    assert loss == want
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, wanted[name], err_msg=name)
    assert step.step([batch], 1e-3).loss == want and step.step([batch], 1e-3).loss < want


@pytest.mark.parametrize("fmt", ["int4", "int8", "int4-g64-asym", "int4-order"])
def test_unpackers_agree_and_rows_are_rows(fmt):
    found, rng = packing(fmt), np.random.default_rng(0)
    n, k = 37, 200
    arrays = quantize_packed([rng.standard_normal((n, k)).astype(np.float32)], found.scheme, n, k)
    if found.ordered:
        arrays["order"] = rng.permutation(k).astype(np.int32)
    want = dequantize_packed(arrays, found.scheme, n, k)
    stored = Stored(n, k, fmt, found, arrays)
    for unpack in (NativeUnpacker(), numpy_unpack):
        got = np.full((n, k), np.nan, np.float32)
        stored.fill(got, unpack)
        np.testing.assert_array_equal(got, want)
    ids = np.array([3, 36, 3, 16, 0], np.int32)
    np.testing.assert_array_equal(stored.rows(ids), want[ids])
