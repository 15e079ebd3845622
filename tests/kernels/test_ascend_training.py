"""The Ascend training graph on CPU through stand-ins of the fused operators: golden steps, LoRA, packing, overflow."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from research.qwen.errors import TrainingError
from research.qwen.kernels import ascend_train_graph
from research.qwen.kernels import dropout_words as words
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.kernels.training import MATRICES
from research.qwen.model.ascend_shards import Division
from research.qwen.model.ascend_train_step import AscendTrainStep, step_arrays
from research.qwen.model.open_training import open_training
from research.qwen.model.training_rows import flatten
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from research.qwen.weights.readers import open_checkpoint
from tests.kernels.ascend_train_standins import train_standins
from tests.model.training_cases import golden, golden_batch, model_folder, packed, rows_of, texts

pytestmark = pytest.mark.mindspore
FULL = MethodSpec()
LORA = MethodSpec("lora", 4, 8.0, 0.0, targets=("all",), modules_to_save=("lm_head",))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The golden model's first layer as a model: its graphs compile in half the time."""
    folder, source = tmp_path_factory.mktemp("small"), open_checkpoint(model_folder())
    config = json.loads((model_folder() / "config.json").read_text())
    config |= {name: 1 for name in ("num_hidden_layers", "n_layer") if name in config}
    (folder / "config.json").write_text(json.dumps(config))
    names = [name for name in source.names() if "transformer.h.1." not in name]
    save_file({name: np.array(source.read(name)) for name in names}, folder / "model.safetensors")
    return folder


def plain_step(method, folder=None):
    """A model in training on ``reference``, the golden one by default; of an adapter neither half is zero."""
    plain = open_training(folder or model_folder(), method=method, seed=3)
    random = np.random.default_rng(1)
    for name, value in plain.trainable().items():
        if "lora_B" in name:
            value[:] = random.normal(0, 0.05, value.shape)
    return plain


def ascend_step(plain, length=None, dtype="float32", optimizer=None, **spec) -> AscendTrainStep:
    """The same model as a graph of Ascend's cells."""
    weights = {name: value.copy() for name, value in plain.model.weights.items()}
    fused = train_standins(dtype)
    optimizer = optimizer or plain.optimizer.spec
    return AscendTrainStep(Spec(plain.config, compute=dtype, fused=fused, **spec), optimizer, weights, length)


def assert_same_weights(ours, theirs, limit):
    assert set(ours.trainable()) == set(theirs.trainable())
    for name, value in ours.trainable().items():
        assert np.abs(value - theirs.trainable()[name]).max() < limit, name


def test_golden_steps_and_resume():
    """Losses and gradient norms of the published trainer's five steps; the last two after a resume, bit by bit."""
    found, plain = golden(), plain_step(FULL)
    batch = golden_batch(found)
    step = ascend_step(plain, batch.ids.shape[1])
    losses, norms, kept = [], [], {}
    for number in range(5):
        if number == 3:
            kept = {name: value.copy() for name, value in step.state().items()}
        result, other = step.step([batch], 1e-3), plain.step([batch], 1e-3)
        assert result.tokens == other.tokens and not result.overflow
        losses.append(result.loss)
        norms.append(result.grad_norm)
    losses.append(step.evaluate(batch)[0] / result.tokens)
    assert np.abs(np.array(losses) - found["trainer_losses"]).max() < 1e-4
    assert np.abs(np.array(norms) / found["trainer_grad_norms"] - 1).max() < 1e-4
    assert_same_weights(step, plain, 2e-4)
    last = step.state()
    step.load_state(kept)
    assert [step.step([batch], 1e-3).loss for _ in range(2)] == losses[3:5]
    assert all(np.array_equal(value, last[name]) for name, value in step.state().items())


def test_adapters_packed_rows_and_micro_batches(small):
    """LoRA beside frozen weights, several texts a row, the rows in two parts: as the cells of ``reference``."""
    plain = plain_step(LORA, small)
    step = ascend_step(
        plain,
        packed=True,
        trained=False,
        saved=("lm_head",),
        rank=4,
        alpha=8.0,
        targets=LORA.matrices(),
        layout=ParallelLayout(micro_batches=2),
    )
    a, b, c, d, e, f = texts((9, 4, 13, 7, 5, 8), plain.config.vocab_size)
    micro = [packed([[a, b], [c]], width=16), packed([[d, e], [f]], width=16)]
    for _ in range(3):
        result, other = step.step(micro, 1e-2), plain.step(micro, 1e-2)
        assert result.tokens == other.tokens == 8 + 3 + 12 + 6 + 4 + 7
        assert abs(result.loss - other.loss) < 1e-4 and abs(result.grad_norm / other.grad_norm - 1) < 1e-4
    few = [packed([[a]], width=16)]  # an epoch's last step has fewer rows
    assert abs(step.step(few, 1e-2).loss - plain.step(few, 1e-2).loss) < 1e-4
    assert_same_weights(step, plain, 2e-4)


class MasksOfTheGraph:
    """In the place of ``model.lora.Dropout``: what the graph keeps of the tokens of a step."""

    def __init__(self, rate, seed, micro, config):
        self.rate, self.seed, self.keep = rate, seed, words.chances(rate) / words.CHANCES
        sizes = np.cumsum([0, *(batch.ids.size for batch in micro)])
        self.places = [flatten(b, config).places + at for b, at in zip(micro, sizes[:-1], strict=True)]
        self.total = sizes[-1]

    def kept(self, step, micro, layer, matrix, shape):
        tokens = words.token_words(self.seed, step, 0, self.total, self.rate)[self.places[micro]]
        mask = kept_inputs(tokens, self.seed, layer, MATRICES.index(matrix), shape[1])
        assert mask.shape == shape
        return mask


def kept_inputs(tokens, seed, layer, matrix, n_in):
    """The rule of ``dropout_words`` in NumPy: (T, n_in) bool."""
    a, b, c, limit = (tokens ^ words.matrix_words(seed, layer, matrix)).T[:, :, None]
    x, y, z = words.input_words(seed, n_in)
    return (((a ^ x) * (b ^ y) ^ c ^ z) & words.BITS) < limit


def test_dropout_of_adapters(small):
    """Steps with the masks of the graph in the model of ``reference``, with recompute; a resume; no dropout later."""
    method = dataclasses.replace(LORA, dropout=0.3)
    plain = plain_step(method, small)
    step = ascend_step(
        plain,
        trained=False,
        saved=("lm_head",),
        rank=4,
        alpha=8.0,
        targets=LORA.matrices(),
        dropout=0.3,
        seed=7,
        recompute=True,
        layout=ParallelLayout(micro_batches=2),
    )
    micro = [rows_of(texts(lengths, plain.config.vocab_size)) for lengths in ((16, 9), (12, 16))]
    plain.model.dropout = MasksOfTheGraph(0.3, 7, micro, plain.config)
    losses = []
    for number in range(3):
        if number == 2:
            kept = {name: value.copy() for name, value in step.state().items()}
        result, other = step.step(micro, 1e-2), plain.step(micro, 1e-2)
        losses.append(result.loss)
        assert abs(result.loss - other.loss) < 1e-4 and abs(result.grad_norm / other.grad_norm - 1) < 1e-4
    assert_same_weights(step, plain, 2e-4)
    assert abs(step.evaluate(micro[0])[0] - plain.evaluate(micro[0])[0]) < 1e-3
    step.load_state(kept)
    assert step.step(micro, 1e-2).loss == losses[-1]


def test_masks_are_like_coins():
    """Of the wanted share, in every row and column; neither inputs, tokens, matrices nor steps fall together."""
    tokens, width, rate = 512, 1024, 0.05
    rows = words.token_words(3, 0, 0, tokens, rate)
    assert np.array_equal(rows[:100], words.token_words(3, 0, 0, 100, rate))  # rows of padding change nothing
    dropped = ~kept_inputs(rows, 3, 0, 0, width)
    assert abs(dropped.mean() - rate) < 0.002
    for axis, count in ((0, tokens), (1, width)):
        spread = dropped.mean(axis).std() / np.sqrt(rate * (1 - rate) / count)
        assert 0.9 < spread < 1.1
        centred = (dropped - rate if axis else (dropped - rate).T) / np.sqrt(rate * (1 - rate))
        together = centred @ centred.T / np.sqrt(centred.shape[1])  # of two different ones: about normal
        assert abs(together[np.triu_indices_from(together, 1)].std() - 1) < 0.05
    others = [~kept_inputs(rows, 3, *place, width) for place in ((0, 1), (1, 0), (31, 4))]
    others += [
        ~kept_inputs(words.token_words(3, s, c, tokens, rate), 3, 0, 0, width) for s, c in ((1, 0), (0, 1))
    ]
    for other in others:
        assert abs((dropped & other).mean() - rate**2) < 0.0006
    assert kept_inputs(words.quiet_words(tokens), 3, 0, 0, width).all()


def test_float16_scales_its_loss_and_skips_an_overflow(small):
    plain = plain_step(FULL, small)
    step = ascend_step(plain, 16, "float16", OptimizerSpec(loss_scale=2.0**30, loss_scale_window=2))
    batch = rows_of(texts((16, 11), plain.config.vocab_size))
    before = step.trainable()
    first = step.step([batch], 1e-3)
    assert first.overflow and first.loss_scale == 2.0**30
    assert all(np.array_equal(value, before[name]) for name, value in step.trainable().items())
    while (result := step.step([batch], 1e-3)).overflow:
        assert step.scale.value < result.loss_scale
    other = plain.step([batch], 1e-3)
    assert abs(result.loss - other.loss) < 5e-3 and abs(result.grad_norm / other.grad_norm - 1) < 0.02
    assert int(step.state()["updates"]) == 1


class Pair:
    """What both of two devices hear that share the rows of one model; here one of them has all of it."""

    rank, world = 0, 2

    def sums(self, *values):
        return [2 * value for value in values]

    def add(self, gradients):
        pass


def test_matrices_in_bands_are_those_of_the_published_model(monkeypatch, small):
    """The graph of model_parallel 2 (q, k, v apart, no Swiglu, parts loaded and saved), undivided, on one device."""
    monkeypatch.setattr(ascend_train_graph, "_VirtualDatasetCell", lambda network: network)
    plain = plain_step(FULL, small)
    batch = golden_batch(golden())
    weights = {name: value.copy() for name, value in plain.model.weights.items()}
    spec = Spec(plain.config, compute="float32", fused=train_standins(), layout=ParallelLayout(model=2))
    step = AscendTrainStep(spec, plain.optimizer.spec, weights, batch.ids.shape[1], Pair())
    whole = {name: Division((1,), (-1,) * len(shape), False) for name, shape in step._shapes.items()}
    monkeypatch.setattr(step._shards, "found", lambda layouts: step._shards.divisions.update(whole))
    before = step.state()
    assert any("c_attn.q" in name for name in step._shapes)
    assert all(np.array_equal(before[name], value) for name, value in plain.state().items())
    for _ in range(2):
        result, other = step.step([batch], 1e-3), plain.step([batch], 1e-3)
        assert abs(result.loss - other.loss) < 1e-5 and abs(result.grad_norm / other.grad_norm - 1) < 1e-5
    after = step.state()
    assert max(np.abs(after[name] - value).max() for name, value in plain.state().items()) < 2e-4
    with pytest.raises(TrainingError, match="no evaluation during training"):
        step.evaluate(batch)


@pytest.mark.parametrize(
    ("length", "ids", "packing", "message"),
    [
        (8, [[1] * 9], False, "exceeds max_length 8"),
        (8, [[1, 1000]], False, "token id 1000 is outside the vocabulary of 1000"),
        (8, [[1, -1]], False, "token id -1"),
    ],
)
def test_bad_rows_are_refused(length, ids, packing, message):
    config = open_config()
    with pytest.raises(TrainingError, match=message):
        step_arrays([rows_of(ids)], config, length, 1.0, packing)


@pytest.mark.parametrize("packing", [False, True])
def test_a_hidden_token_is_seen_by_none(small, packing):
    """As the cells of ``reference``, which leave it out: loss and gradients, and neither does its id matter."""
    plain = plain_step(FULL, small)
    step = ascend_step(plain, packed=packing)
    a, b = texts((9, 7), plain.config.vocab_size)
    rows = packed([[a, b]] if packing else [[a], [b]])
    segments = rows.segments.copy()
    segments[0, [0, 4]] = -2
    batch = dataclasses.replace(rows, segments=segments)
    result, other = step.evaluate(batch), plain.evaluate(batch)
    assert result[1] == other[1] < step.evaluate(rows)[1]
    assert abs(result[0] - other[0]) < 1e-4
    changed = rows.ids.copy()
    changed[0, [0, 4]] = (changed[0, [0, 4]] + 1) % plain.config.vocab_size
    assert step.evaluate(dataclasses.replace(batch, ids=changed)) == result
    result, other = step.step([batch], 1e-3), plain.step([batch], 1e-3)
    assert abs(result.grad_norm / other.grad_norm - 1) < 1e-4


def test_packed_rows_need_their_graph():
    with pytest.raises(TrainingError, match="without packing"):
        step_arrays([packed([[[1, 2], [3, 4]]])], open_config(), None, 1.0, False)


def test_the_mask_of_packed_rows():
    mask = step_arrays([packed([[[1, 2], [3]]], width=4)], open_config(), None, 1.0, True)[5]
    assert mask[0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]


def open_config():
    from research.qwen.config import QwenConfig

    return QwenConfig.from_folder(model_folder())
