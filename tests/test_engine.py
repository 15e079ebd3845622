"""The engine on the golden model of the published vocabulary: texts, streams, stops, seeds, scores, errors."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.errors import ConfigError, KernelError, PromptError, RequestError
from tests.fixtures_util import model_folder
from tests.model.golden import load

pytestmark = pytest.mark.mindspore
GREEDY = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.3, top_p=0.95, seed=7, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def engine(request, published_vocab):
    return Engine.from_pretrained(
        model_folder("full_vocab_bf16"),
        backend=request.param,
        dtype="float32",
        vocab_file=published_vocab,
        num_blocks=64,
    )


@pytest.fixture(scope="module")
def golden():
    return load("full_vocab_bf16")


def prompt_ids(golden, i):
    return [int(t) for t in golden[f"text{i}_ids"]]


def test_greedy_texts(engine, golden):
    prompts = [prompt_ids(golden, i) for i in range(3)]
    for i, result in enumerate(engine.generate(prompts, GREEDY)):
        np.testing.assert_array_equal(prompts[i] + result.ids, golden[f"text{i}_greedy_ids"])
        assert result.text == engine.tokenizer.decode(result.ids, skip_special_tokens=True)
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prompts[i]), 32)


def test_text_and_ids_are_the_same_prompt(engine, golden):
    text = engine.tokenizer.decode(prompt_ids(golden, 1))
    assert engine.tokenizer.encode(text) == prompt_ids(golden, 1)
    assert engine.generate([text], GREEDY)[0].ids == engine.generate([prompt_ids(golden, 1)], GREEDY)[0].ids


def test_top_logits(engine, golden):
    for i in range(3):
        rows = engine.logits(prompt_ids(golden, i))
        assert rows.shape == (len(prompt_ids(golden, i)), 151936) and rows.dtype == np.float32
        top = golden[f"text{i}_top_ids"]
        np.testing.assert_allclose(np.take_along_axis(rows, top, 1), golden[f"text{i}_top_logits"], atol=3e-4)


def test_stream_is_the_text_in_whole_characters(engine, golden):
    prompt = prompt_ids(golden, 0)
    whole = engine.generate([prompt], GREEDY)[0]
    deltas = list(engine.stream(prompt, GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [i for delta in deltas for i in delta.ids] == whole.ids
    assert [delta.finish_reason for delta in deltas] == [None] * 31 + ["length"]
    assert deltas[-1].usage == whole.usage
    assert all("\ufffd" not in delta.text for delta in deltas) or "\ufffd" in whole.text


def test_stop_string_ends_the_answer_and_is_not_shown(engine, golden):
    prompt = prompt_ids(golden, 0)
    text = engine.generate([prompt], GREEDY)[0].text
    stop = text[len(text) // 2 :][:3]
    params = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True, stop=[stop])
    result = engine.generate([prompt], params)[0]
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(delta.text for delta in engine.stream(prompt, params)) == result.text


def test_stop_id_is_in_ids_and_not_in_text(engine, golden):
    prompt = prompt_ids(golden, 0)
    whole = engine.generate([prompt], GREEDY)[0]
    end = whole.ids[5]
    first = whole.ids.index(end)
    result = engine.generate([prompt], SamplingParams(temperature=0, stop_token_ids=[end], ignore_eos=True))[
        0
    ]
    assert result.ids == whole.ids[: first + 1]
    assert result.finish_reason == "stop"
    assert result.text == engine.tokenizer.decode(result.ids[:-1], skip_special_tokens=True)


def test_chat_models_stop_at_their_control_tokens(engine):
    assert set(engine.eos_ids) == {151643, 151644, 151645}


def test_same_seed_same_text_whatever_runs_beside(engine, golden):
    prompt = prompt_ids(golden, 2)
    alone = engine.generate([prompt], SEEDED)[0].ids
    crowd = engine.generate([prompt_ids(golden, 0), prompt, prompt_ids(golden, 1), prompt], SEEDED)
    assert crowd[1].ids == alone and crowd[3].ids == alone
    other = engine.generate(
        [prompt], SamplingParams(temperature=1.3, seed=8, max_new_tokens=12, ignore_eos=True)
    )
    assert other[0].ids != alone


def test_several_choices(engine, golden):
    params = SamplingParams(temperature=1.3, seed=7, n=3, max_new_tokens=8, ignore_eos=True)
    result = engine.generate([prompt_ids(golden, 0)], params)[0]
    assert len(result.choices) == 3
    assert len({tuple(choice.ids) for choice in result.choices}) > 1
    assert result.usage.completion_tokens == 24


def test_logprobs_and_score_agree(engine, golden):
    prompt = prompt_ids(golden, 0)
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, logprobs=3)
    result = engine.generate([prompt], params)[0]
    score = engine.score(prompt, result.ids)
    np.testing.assert_allclose([entry.logprob for entry in result.logprobs], score.logprobs, atol=1e-4)
    assert score.greedy.all() and score.ids == result.ids
    assert all(len(entry.top) == 3 and entry.top[0][0] == entry.id for entry in result.logprobs)
    whole = engine.score(prompt + result.ids)
    np.testing.assert_allclose(whole.logprobs[-6:], score.logprobs, atol=1e-4)
    assert whole.total == pytest.approx(whole.logprobs.sum())


def test_threads_share_the_engine(engine, golden):
    prompts = [prompt_ids(golden, i % 3) for i in range(6)]
    want = [engine.generate([prompt], GREEDY)[0].ids for prompt in prompts]
    got: dict[int, list[int]] = {}

    def ask(i):
        got[i] = [token for delta in engine.stream(prompts[i], GREEDY) for token in delta.ids]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == want


def test_closing_a_stream_frees_its_cache(engine, golden):
    stream = engine.stream(prompt_ids(golden, 0), GREEDY)
    next(stream)
    assert engine._loop.pool.free_blocks < engine.lm.num_blocks
    stream.close()
    assert engine._loop.pool.free_blocks == engine.lm.num_blocks


def test_interleaved_streams(engine, golden):
    want = [engine.generate([prompt_ids(golden, i)], GREEDY)[0].text for i in (0, 1)]
    streams = [engine.stream(prompt_ids(golden, i), GREEDY) for i in (0, 1)]
    texts = ["", ""]
    for a, b in zip(*streams, strict=True):
        texts[0] += a.text
        texts[1] += b.text
    assert texts == want


def test_chat_renders_the_published_prompt(engine):
    ids = engine.render([{"role": "user", "content": "你好"}])
    want = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    assert engine.tokenizer.decode(ids) == want + "<|im_start|>assistant\n"
    assert engine.chat([{"role": "user", "content": "你好"}], GREEDY).prompt_ids == ids


def test_defaults_of_the_checkpoint(engine):
    params = engine.default_params()
    assert (params.top_p, params.repetition_penalty, params.max_new_tokens) == (0.8, 1.1, 512)
    assert engine.default_params(temperature=0).greedy


def test_no_graph_is_compiled_again(engine):
    assert engine.lm.compilations == 1


@pytest.mark.parametrize("prompt", [[], ""])
def test_empty_prompt(engine, prompt):
    with pytest.raises(PromptError, match="empty"):
        engine.generate([prompt], GREEDY)


@pytest.mark.parametrize("bad", [151936, -1])
def test_ids_outside_the_vocabulary(engine, bad, golden):
    with pytest.raises(PromptError, match=f"token id {bad} is outside"):
        engine.generate([[1, bad]], GREEDY)
    with pytest.raises(PromptError, match="outside"):
        engine.logits([bad])
    assert engine.generate([prompt_ids(golden, 1)], GREEDY)[0].ids  # the process still works


def test_prompt_longer_than_the_context(engine):
    with pytest.raises(PromptError, match=r"1024 tokens.*context holds 1024"):
        engine.generate([[1] * 1024], GREEDY)
    with pytest.raises(PromptError, match="context holds 1024"):
        engine.logits([1] * 1025)


def test_one_bad_prompt_refuses_the_batch_and_leaves_nothing_running(engine, golden):
    with pytest.raises(PromptError, match="outside"):
        engine.generate([prompt_ids(golden, 0), [-1]], GREEDY)
    assert not engine._loop.busy and not engine.requests


def test_an_interrupted_batch_leaves_nothing_running(engine, golden, monkeypatch):
    calls = []

    def interrupt(key, params):
        calls.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt_ids(golden, 0), prompt_ids(golden, 1)], GREEDY)
    assert calls and not engine._loop.busy and not engine.requests


def test_not_a_prompt(engine):
    with pytest.raises(PromptError, match="integers"):
        engine.generate([[1.5]], GREEDY)
    with pytest.raises(RequestError, match="role"):
        engine.chat([{"role": "robot", "content": "x"}])


def test_unknown_device_backend_dtype():
    folder = model_folder("st_new_bf16")
    with pytest.raises(KernelError, match="unknown device 'tpu'"):
        Engine.from_pretrained(folder, device="tpu")
    with pytest.raises(KernelError, match="unknown backend 'cuda'"):
        Engine.from_pretrained(folder, backend="cuda")
    with pytest.raises(ConfigError, match="'int3' is none of float32"):
        Engine.from_pretrained(folder, dtype="int3")
    with pytest.raises(KernelError, match="KV cache"):
        Engine.from_pretrained(folder, kv_dtype="int4")
    with pytest.raises(KernelError, match="no Ascend"):
        Engine.from_pretrained(folder, device="ascend", dtype="float16")


def test_without_vocabulary_it_works_on_ids(monkeypatch):
    engine = Engine.from_pretrained(model_folder("st_new_bf16"), backend="reference", num_blocks=64)
    assert engine.tokenizer is None
    result = engine.generate([[1, 2, 3]], GREEDY)[0]
    assert len(result.ids) == 32 and result.text == ""
    with pytest.raises(RequestError, match="vocabulary"):
        engine.generate(["text"], GREEDY)
    with pytest.raises(RequestError, match="vocabulary"):
        engine.generate([[1]], SamplingParams(stop=["x"]))
