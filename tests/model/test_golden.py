"""Parity with the independent run of the published model, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.decode.loop import Chunk, GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from tests.model.golden import BACKENDS, TOLERANCE, assert_logits, load, weights_folder

pytestmark = pytest.mark.mindspore
MODELS = ("st_new_bf16", "bin_old_fp16", "bin_sharded_fp32")
GREEDY = SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True)
REPEAT = SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True, repetition_penalty=1.1)


@pytest.fixture(scope="module", params=[(b, m) for b in BACKENDS for m in MODELS], ids="-".join)
def case(request):
    backend, name = request.param
    engine = Engine.from_pretrained(weights_folder(name), backend=backend, kv_dtype="float32", num_blocks=96)
    return name, engine, load(name)


def prompts(golden):
    return [golden[f"prompt{i}_ids"] for i in range(3)]


def test_one_pass(case):
    _, engine, golden = case
    for i, ids in enumerate(prompts(golden)):
        assert_logits(golden, f"prompt{i}_logits", engine.logits(ids))


def test_prefill_then_single_steps(case):
    _, engine, golden = case
    ids, prefill = golden["inc_ids"], int(golden["inc_prefill"])
    lm, blocks = engine.lm, list(range(10))
    rows = [lm.forward([Chunk(ids[:prefill], 0, blocks, 1.0, prefill)])]
    rows += [lm.forward([Chunk(ids[i : i + 1], i, blocks, 1.0, 1)]) for i in range(prefill, len(ids))]
    assert_logits(golden, "inc_logits", np.concatenate(rows))


def test_hidden_states_before_the_head(case):
    name, engine, _ = case
    trace = load(name, "trace.npz")
    ids, blocks = trace["trace_ids"], list(range(10))
    rows = engine.lm.hidden([Chunk(ids[:7], 0, blocks, 1.0, 7)])
    rows = np.concatenate([rows, engine.lm.hidden([Chunk(ids[7:], 7, blocks, 1.0, len(ids) - 7)])])
    assert np.abs(rows - trace["ln_f"]).max() <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 5, 16, 32])
def test_chunked_prefill_equals_one_pass(case, chunk):
    _, engine, golden = case
    ids = golden["prompt2_ids"]
    whole = engine.logits(ids)
    pieces = [
        engine.lm.forward([Chunk(ids[i : i + chunk], i, list(range(10)), 1.0, len(ids[i : i + chunk]))])
        for i in range(0, len(ids), chunk)
    ]
    difference = np.abs(np.concatenate(pieces) - whole).max()
    limit = 0.0 if engine.lm.kernels.name == "cpu" else TOLERANCE  # our kernels promise the same bits
    assert difference <= limit, f"max {difference:.2e}"


def test_greedy_ids_identical(case):
    _, engine, golden = case
    results = engine.generate([list(ids) for ids in prompts(golden)], GREEDY)  # all three in one batch
    for i, result in enumerate(results):
        want = golden[f"greedy{i}_ids"]
        np.testing.assert_array_equal(result.prompt_ids + result.ids, want)
        assert result.finish_reason == "length"


def test_repetition_penalty(case):
    _, engine, golden = case
    for i, result in enumerate(engine.generate([list(ids) for ids in prompts(golden)], REPEAT)):
        np.testing.assert_array_equal(result.prompt_ids + result.ids, golden[f"rep{i}_ids"])


def test_end_token(case):
    _, engine, golden = case
    eos = int(golden["eos_token"])
    prompt = list(golden["prompt1_ids"])
    params = SamplingParams(temperature=0, max_new_tokens=64, stop_token_ids=[eos], ignore_eos=True)
    result = engine.generate([prompt], params)[0]
    np.testing.assert_array_equal(prompt + result.ids, golden["eos_ids"])
    assert result.finish_reason == "stop"


def test_batch_rows_equal_rows_alone(case):
    """Left padding of the published code becomes no padding at all: each row is computed as if it were alone."""
    _, engine, golden = case
    rows = [
        ids[mask.astype(bool)] for ids, mask in zip(golden["batch_ids"], golden["batch_mask"], strict=True)
    ]
    blocks = [list(range(10 * i, 10 * i + 10)) for i in range(len(rows))]
    together = engine.lm.forward(
        [Chunk(row, 0, block, 1.0, len(row)) for row, block in zip(rows, blocks, strict=True)]
    )
    start = 0
    for i, row in enumerate(rows):
        mine = together[start : start + len(row)]
        start += len(row)
        assert_logits(golden, "batch_logits", mine, (i, golden["batch_mask"][i].astype(bool)))
        limit = 0.0 if engine.lm.kernels.name == "cpu" else TOLERANCE
        assert np.abs(mine - engine.logits(row)).max() <= limit
    results = engine.generate([list(row) for row in rows], GREEDY)
    width = golden["batch_ids"].shape[1]
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.ids, golden["batch_greedy_ids"][i, width:])


def test_batch_end_token(case):
    """A finished row just ends; the published code fills it with id 0."""
    _, engine, golden = case
    rows = [
        ids[mask.astype(bool)] for ids, mask in zip(golden["batch_ids"], golden["batch_mask"], strict=True)
    ]
    eos = int(golden["batch_eos_token"])
    params = SamplingParams(temperature=0, max_new_tokens=64, stop_token_ids=[eos], ignore_eos=True)
    width = golden["batch_ids"].shape[1]
    for i, result in enumerate(engine.generate([list(row) for row in rows], params)):
        want = list(golden["batch_eos_ids"][i, width:])
        assert result.ids == want[: len(result.ids)]
        assert set(want[len(result.ids) :]) <= {0}


def test_padding_given_as_ids_is_ordinary_text(case):
    """One row with its padding, as the published code runs it: the mask is ignored there."""
    _, engine, golden = case
    row = golden["batch_ids"][int(golden["padded_single_row"])]
    result = engine.generate([list(row)], GREEDY)[0]
    np.testing.assert_array_equal(result.prompt_ids + result.ids, golden["padded_single_ids"][0])


def test_one_graph_for_everything(case):
    _, engine, golden = case
    engine.logits(golden["prompt2_ids"])
    engine.generate([[1], [2, 3]], SamplingParams(temperature=0, max_new_tokens=3))
    assert engine.lm.compilations == 1


def test_config_naming(case):
    name, engine, _ = case
    assert engine.lm.config == QwenConfig.from_folder(weights_folder(name))


def test_layer_trace(case):
    """Every intermediate value of one pass, cached keys and values included."""
    from tests.model.tracing import trace

    name, engine, _ = case
    golden = load(name, "trace.npz")
    got = trace(engine.lm, golden["trace_ids"])
    stride = int(golden.get("vocab_stride", 1))
    compared = 0
    for key, want in golden.items():
        if key in ("trace_ids", "vocab_stride") or key.endswith(("_argmax", "_max")):
            continue
        mine = got[key][..., ::stride] if key == "logits" else got[key]
        assert mine.shape == want.shape, key
        difference = np.abs(mine - want).max()
        assert difference <= TOLERANCE, f"{key}: max {difference:.2e}"
        compared += 1
    assert compared >= 10 * engine.lm.config.num_layers


def test_repetition_penalty_in_a_batch(case):
    """The published code penalises a row's padding (id 0), too; a row without padding agrees, others are as alone."""
    _, engine, golden = case
    masks = golden["batch_mask"].astype(bool)
    rows = [[int(i) for i in ids[mask]] for ids, mask in zip(golden["batch_ids"], masks, strict=True)]
    width, full = masks.shape[1], [i for i, mask in enumerate(masks) if mask.all()]
    assert full
    results = engine.generate(rows, REPEAT)
    for i, row in enumerate(rows):
        assert results[i].ids == engine.generate([row], REPEAT)[0].ids
    for i in full:
        np.testing.assert_array_equal(results[i].ids, golden["batch_rep_ids"][i, width:])


def test_stop_sequence_at_the_end_of_the_prompt(case):
    """The published code ends there at once (``stop_in_prompt_ids``); ours answers: only new ids end an answer."""
    _, engine, golden = case
    word, prompt = list(golden["stop_in_prompt_word"]), [int(i) for i in golden["prompt1_ids"]]
    assert prompt[-len(word) :] == word and len(golden["stop_in_prompt_ids"]) == len(prompt) + 1
    loop = GenerationLoop(engine.lm)
    loop.add(prompt, GREEDY, stop_sequences=[word])
    tokens = []
    while loop.busy:
        tokens += [event.token for event in loop.step()]
    want = [int(i) for i in golden["greedy1_ids"][len(prompt) :]]
    assert tokens == want[: len(tokens)] and (tokens[-len(word) :] == word or len(tokens) == 64)
