"""Full fine-tuning against the golden losses, gradients and AdamW steps, and what has to hold of any step."""

from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
import pytest

from research.qwen.errors import ConfigError, KernelError, TrainingError
from research.qwen.model.open_training import open_training
from research.qwen.model.optimizer import AdamW
from research.qwen.model.stepping import LossScale
from research.qwen.model.train_step import TrainStep
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from tests.gptq_fixtures import gptq_folder
from tests.model.training_cases import (
    BACKENDS,
    golden,
    golden_batch,
    model_folder,
    packed,
    relative,
    rows_of,
    texts,
)

pytestmark = pytest.mark.mindspore
AS_GOLDEN = {"adamw": OptimizerSpec(clip_norm=None, decay="all"), "trainer": OptimizerSpec()}
GOLDEN = golden()
LENGTHS = (9, 31, 4, 17)


@pytest.fixture(scope="module", params=BACKENDS)
def opened(request):
    """A model whose graphs are compiled once for the tests of a backend, and its first weights."""
    step = open_training(model_folder(), backend=request.param)
    return step, {name: value.copy() for name, value in step.trainable().items()}


@pytest.fixture
def start(opened):
    """Makes a TrainStep from the checkpoint's weights, with the graphs that are there."""

    def make(spec: OptimizerSpec | None = None, scale: float | None = None) -> TrainStep:
        step, weights = opened
        spec = spec or OptimizerSpec()
        parameters = step.trainable()
        for name, value in weights.items():
            np.copyto(parameters[name], value)
        window = spec.loss_scale_window
        return TrainStep(
            step.config, step.model, parameters, AdamW(spec, parameters), LossScale(scale, window)
        )

    return make


def test_loss_and_every_gradient(start):
    step = start()
    loss, tokens, gradients = step.gradients([golden_batch(GOLDEN)])
    assert abs(loss - GOLDEN["loss_train"]) < 1e-4
    assert tokens == 48
    assert abs(step.optimizer.norm(gradients) / GOLDEN["grad_total_norm"] - 1) < 1e-4
    assert set(gradients) == {name.removeprefix("norm__") for name in GOLDEN if name.startswith("norm__")}
    for name, gradient in gradients.items():
        norm, stride = GOLDEN[f"norm__{name}"], int(GOLDEN[f"stride__{name}"])
        assert abs(np.linalg.norm(gradient) / norm - 1) < 1e-4, name
        assert relative(gradient.reshape(-1)[::stride], GOLDEN[f"grad__{name}"]) < 1e-4, name


def test_logits_are_those_of_training_without_ntk_and_logn(start):
    """The batch is longer than seq_length, so both would show."""
    batch = golden_batch(GOLDEN)
    assert batch.ids.shape[1] > start().config.seq_length
    got = start().logits(batch)[:, ::4, :: int(GOLDEN["vocab_stride"])]
    seen = GOLDEN["attention_mask"][:, ::4] > 0
    assert np.abs(got - GOLDEN["logits_train"])[seen].max() < 3e-4


@pytest.mark.parametrize("kind", AS_GOLDEN)
def test_five_steps(start, kind):
    step, batch = start(AS_GOLDEN[kind]), golden_batch(GOLDEN)
    results = [step.step([batch], 1e-3) for _ in range(5)]
    total, tokens = step.evaluate(batch)
    losses = [result.loss for result in results] + [total / tokens]
    np.testing.assert_allclose(losses, GOLDEN[f"{kind}_losses"], rtol=0, atol=1e-4)
    norms = [result.grad_norm for result in results]
    np.testing.assert_allclose(norms, GOLDEN[f"{kind}_grad_norms"], rtol=1e-4)
    parameters = step.trainable()
    checked = [name for name in GOLDEN if name.startswith(f"{kind}__")]
    assert len(checked) == 8
    for name in checked:
        difference = np.abs(parameters[name.removeprefix(f"{kind}__")] - GOLDEN[name]).max()
        assert difference < 2e-4, name


def close(first, second, tolerance=1e-6):
    """Loss, tokens and every gradient agree."""
    assert abs(first[0] - second[0]) < tolerance * abs(second[0]) and first[1] == second[1]
    for name, gradient in second[2].items():
        assert relative(first[2][name], gradient) < tolerance, name


def test_micro_batches_add_up_to_one_batch(start):
    """Their token counts differ, so a mean of means would not do."""
    step = start()
    four = texts(LENGTHS, step.config.vocab_size)
    whole = step.gradients([rows_of(four)])
    close(step.gradients([rows_of([text]) for text in four]), whole)


def test_packed_rows_are_the_unpacked_samples(start):
    step = start()
    four = texts(LENGTHS, step.config.vocab_size)
    unpacked = step.gradients([rows_of(four)])
    close(step.gradients([packed([four[:2], four[2:]])]), unpacked)
    close(step.gradients([packed([four])]), unpacked)


def test_one_text_of_a_row_does_not_see_the_other(start):
    step = start()
    first, second = texts((12, 8), step.config.vocab_size)
    batch = packed([[first, second]])
    alone = step.logits(rows_of([second]))[0]
    np.testing.assert_allclose(step.logits(batch)[0, 12:], alone, rtol=0, atol=2e-5)


def test_logits_in_runs_are_those_at_once(start):
    step = start()
    batch = rows_of(texts(LENGTHS, step.config.vocab_size))
    at_once = step.gradients([batch]), step.evaluate(batch)
    way = step.model.way
    step.model.way = dataclasses.replace(way, head_rows=7)
    try:
        close(step.gradients([batch]), at_once[0])
        assert abs(step.evaluate(batch)[0] / at_once[1][0] - 1) < 1e-6
    finally:
        step.model.way = way


def test_layers_run_again_give_the_same_bits(start):
    step = start()
    batch = golden_batch(GOLDEN)
    _, _, kept = step.gradients([batch])
    step.model.recompute = True
    try:
        _, _, again = step.gradients([batch])
    finally:
        step.model.recompute = False
    for name, gradient in kept.items():
        np.testing.assert_array_equal(again[name], gradient, err_msg=name)


def test_evaluation_is_the_loss_and_changes_nothing(start):
    step, batch = start(), golden_batch(GOLDEN)
    before = {name: np.copy(value) for name, value in step.state().items()}
    total, tokens = step.evaluate(batch)
    assert abs(total / tokens - step.gradients([batch])[0]) < 1e-6
    for name, value in step.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_overflow_changes_nothing_but_the_scale(start):
    step, batch = start(scale=2.0**126), golden_batch(GOLDEN)
    before = {name: np.copy(value) for name, value in step.trainable().items()}
    result = step.step([batch], 1e-3)
    assert result.overflow and not np.isfinite(result.grad_norm) and np.isfinite(result.loss)
    assert result.loss_scale == 2.0**126 and step.scale.value == 2.0**125
    assert step.optimizer.updates == 0
    for name, value in step.trainable().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_loss_scale_changes_no_step_and_grows_after_good_ones(start):
    batch, spec = golden_batch(GOLDEN), OptimizerSpec(loss_scale_window=2)
    plain, scaled = start(spec), None
    without = [plain.step([batch], 1e-3) for _ in range(3)]
    scaled = start(spec, scale=1024.0)
    results = [scaled.step([batch], 1e-3) for _ in range(3)]
    assert [result.loss_scale for result in results] == [1024.0, 1024.0, 2048.0]
    assert scaled.state()["loss_scale"] == 2048.0 and scaled.state()["loss_scale_good"] == 1
    for got, want in zip(results, without, strict=True):
        assert abs(got.loss - want.loss) < 1e-5 and abs(got.grad_norm / want.grad_norm - 1) < 1e-5


def test_a_diverged_model_says_so(start):
    step = start()
    step.trainable()["lm_head.weight"][3, 5] = np.nan
    batch = golden_batch(GOLDEN)
    assert np.isnan(step.evaluate(batch)[0])
    result = step.step([batch], 1e-3)
    assert np.isnan(result.loss) and result.overflow


def test_nothing_to_learn(start):
    batch = golden_batch(GOLDEN)
    ignored = dataclasses.replace(batch, labels=np.full_like(batch.labels, -100))
    step = start()
    assert step.evaluate(ignored) == (0.0, 0)
    with pytest.raises(TrainingError, match="nothing to learn"):
        step.step([ignored], 1e-3)
    close(step.gradients([ignored, batch]), step.gradients([batch]))


def test_states_of_other_models_are_refused(start):
    step = start()
    state = dict(step.state())
    with pytest.raises(TrainingError, match=r"missing \['adam_m.lm_head.weight'"):
        step.load_state({name: value for name, value in state.items() if "lm_head" not in name})
    with pytest.raises(TrainingError, match=r"unknown \['more'"):
        step.load_state({**state, "more": state["step"]})
    with pytest.raises(TrainingError, match=r"lm_head.weight has shape \(3,\)"):
        step.load_state({**state, "lm_head.weight": np.zeros(3, np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_goes_on_bit_for_bit(backend):
    """In a new TrainStep, and in a process that has left MindSpore in PYNATIVE mode."""
    first = open_training(model_folder(), backend=backend)
    batches = [rows_of(texts(LENGTHS, first.config.vocab_size, seed)) for seed in range(4)]
    for batch in batches[:2]:
        first.step([batch], 1e-3)
    state = {name: np.copy(value) for name, value in first.state().items()}
    wanted = [first.step([batch], 1e-3) for batch in batches[2:]]
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        second = open_training(model_folder(), backend=backend)
        second.load_state(state)
        assert [second.step([batch], 1e-3) for batch in batches[2:]] == wanted
        assert ms.get_context("mode") == ms.PYNATIVE_MODE
    finally:
        ms.set_context(mode=mode)
    for name, value in second.state().items():
        np.testing.assert_array_equal(value, first.state()[name], err_msg=name)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="use the method qlora"):
        open_training(gptq_folder("int4"))
    with pytest.raises(KernelError, match="computes in float32"):
        open_training(model_folder(), compute_dtype="bfloat16")
    with pytest.raises(KernelError, match="does not train"):
        open_training(model_folder(), backend="gpu")
    with pytest.raises(ConfigError):
        MethodSpec("lora", targets=("q_proj",))
