"""What an engine does with requests, on a fake model with the vocabulary of the demo."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.errors import LogitsError, PromptError, RequestError
from research.qwen.text.tokenizer import QwenTokenizer
from tests.fakes import FakeLM

SEEDED = SamplingParams(temperature=1.5, seed=3, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer(demo_folder() / "qwen.tiktoken")


def fake(tokenizer, num_blocks=64, rows=None, **options):
    lm = FakeLM(num_blocks=num_blocks, vocab_size=rows or len(tokenizer), max_length=128)
    return Engine(lm, tokenizer, generation={"chat_format": "chatml"}, **options)


class Scripted:
    """A processor that makes the model say a text."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, ids, row):
        row[:] = -np.inf
        row[self.ids.pop(0)] = 0
        return row


def said(engine, ids, **fields):
    """All deltas of a request whose answer is given."""
    out = []
    params = SamplingParams(**{"max_new_tokens": len(ids), **fields})
    engine.requests.open([1, 2], params, out.append, processors=lambda _: [Scripted(ids)])
    while engine.requests.loop.busy:
        engine.requests.pump()
    return out


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


def test_a_second_turn_finds_the_first_in_the_cache(tokenizer):
    engine = fake(tokenizer)
    first = engine.generate([[7] * 17], SEEDED)[0]
    again = engine.generate([[7] * 17], SEEDED)[0]
    assert again.ids == first.ids and again.text == first.text
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 16)
    engine.forget_prefixes()
    assert engine.generate([[7] * 17], SEEDED)[0].usage.cached_tokens == 0
    assert fake(tokenizer, prefix_caching=False).generate([[7] * 17] * 2, SEEDED)[1].usage.cached_tokens == 0


def test_prompt_logprobs_are_in_the_result_and_agree_with_score(tokenizer):
    engine = fake(tokenizer)
    prompt = [5, 6, 7, 8, 9]
    result = engine.generate(
        [prompt], SamplingParams(temperature=0, max_new_tokens=0, prompt_logprobs=1, n=2)
    )[0]
    assert [choice.ids for choice in result.choices] == [[], []] and result.finish_reason == "length"
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 5
    score = engine.score(prompt)
    np.testing.assert_allclose([e.logprob for e in result.prompt_logprobs[1:]], score.logprobs, atol=1e-5)
    assert engine.generate([prompt], SEEDED)[0].prompt_logprobs is None


def test_stop_strings_are_cut_or_kept(tokenizer):
    ids = tokenizer.encode("one two three")
    assert text_of(said(fake(tokenizer), ids, stop=["two"])) == "one "
    deltas = said(fake(tokenizer), ids, stop=["two"], include_stop_str_in_output=True)
    assert text_of(deltas) == "one two" and deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage.completion_tokens == sum(len(delta.ids) for delta in deltas)


def test_stop_strings_count_from_the_least_length_on(tokenizer):
    ids = tokenizer.encode("aXbXc")
    assert len(ids) == 5
    assert text_of(said(fake(tokenizer), ids, stop=["X"], min_new_tokens=3)) == "aXb"
    assert text_of(said(fake(tokenizer), ids, stop=["X"])) == "a"


def test_control_tokens_are_shown_if_asked_for(tokenizer):
    im_end, im_start = tokenizer.im_end_id, tokenizer.im_start_id
    ids = [*tokenizer.encode("a"), im_start, *tokenizer.encode("b"), im_end]
    shown = {"skip_special_tokens": False, "ignore_eos": True}
    assert text_of(said(fake(tokenizer), ids[:3], ignore_eos=True)) == "ab"
    assert text_of(said(fake(tokenizer), ids[:3], **shown)) == "a<|im_start|>b"
    ended = said(fake(tokenizer), ids, stop_token_ids=[im_end], **shown)
    assert text_of(ended) == "a<|im_start|>b" and ended[-1].ids == (im_end,)
    kept = said(fake(tokenizer), ids, stop_token_ids=[im_end], include_stop_str_in_output=True, **shown)
    assert text_of(kept) == "a<|im_start|>b<|im_end|>"


def test_a_token_without_text_fails_its_request_only(tokenizer):
    engine = fake(tokenizer, rows=len(tokenizer) + 8)  # rows that pad the vocabulary
    fine, bad = [], []
    engine.requests.open([1, 2], SEEDED, fine.append)
    params = SamplingParams(max_new_tokens=4, n=2)
    engine.requests.open(
        [1, 2], params, bad.append, processors=lambda c: [Scripted([3, len(tokenizer), 3, 3])]
    )
    while engine.requests.loop.busy:
        engine.requests.pump()
    assert isinstance(bad[-1], PromptError) and [d.ids for d in bad[:-1]] == [(3,), (3,)]
    assert fine[-1].usage.completion_tokens == 12
    assert len(engine.requests) == 0 and engine.requests.loop.pool.free_blocks == 64


def test_a_failed_request_of_a_batch_is_raised_and_nothing_stays(tokenizer):
    engine = fake(tokenizer)
    engine.lm.fail_at = 2
    with pytest.raises(RuntimeError, match="broken"):
        engine.generate([[1, 2], [3, 4]], SEEDED)
    assert len(engine.requests) == 0 and not engine.requests.loop.busy
    engine.lm.fail_at = None
    assert engine.generate([[1, 2]], SEEDED)[0].ids == fake(tokenizer).generate([[1, 2]], SEEDED)[0].ids


def test_a_bad_prompt_refuses_the_batch(tokenizer):
    engine = fake(tokenizer)
    with pytest.raises(PromptError, match="outside"):
        engine.generate([[1, 2], [-1]], SEEDED)
    assert len(engine.requests) == 0 and not engine.requests.loop.busy
    with pytest.raises(RequestError, match="stop strings need a vocabulary"):
        Engine(FakeLM()).generate([[1]], SamplingParams(stop=["x"]))


def test_embeddings_are_means_of_unit_length(tokenizer):
    engine = fake(tokenizer)
    batch = [[1, 2, 3], [4] * 100]  # the second in two pieces
    got = engine.embed(batch)
    assert got.shape == (2, engine.lm.hidden_size) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    rows = engine.logits(batch[1])[:, : engine.lm.hidden_size].astype(np.float64)
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(got[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(got[1:], engine.embed(batch[1:]))
    assert engine.requests.loop.pool.free_blocks == 64


def test_embeddings_refuse_what_makes_no_sense(tokenizer):
    engine = fake(tokenizer)
    for batch, what in (([], "nothing to embed"), ([[1], []], "empty"), ([[len(tokenizer)]], "outside")):
        with pytest.raises(PromptError, match=what):
            engine.embed(batch)
    with pytest.raises(PromptError, match="the context holds 128"):
        engine.embed([[1] * 129])
    engine.lm.hidden = lambda chunks: np.full((1, 8), np.nan, np.float32)
    with pytest.raises(LogitsError, match="overflowed"):
        engine.embed([[1]])
    assert engine.requests.loop.pool.free_blocks == 64


def test_scores_and_embeddings_find_room_beside_running_streams(tokenizer):
    engine = fake(tokenizer, num_blocks=8)
    want = fake(tokenizer).generate([[7] * 10], SEEDED)[0].ids
    stream = engine.stream([7] * 10, SEEDED)
    got = [next(stream).ids]
    assert engine.score([1] * 30).total < 0  # takes all 8 blocks
    engine.embed([[2] * 30])
    got += [delta.ids for delta in stream]
    assert [i for ids in got for i in ids] == want
    assert engine.requests.loop.counters.preemptions >= 1


def test_a_choice_that_met_its_stop_string_computes_no_further(tokenizer):
    engine, out = fake(tokenizer), []
    scripts = [tokenizer.encode("aXbcdefg"), tokenizer.encode("abcdefgh")]
    params = SamplingParams(max_new_tokens=8, n=2, stop=["X"])
    engine.requests.open([1, 2], params, out.append, processors=lambda c: [Scripted(scripts[c])])
    while engine.requests.loop.busy:
        engine.requests.pump()
    assert [text_of(d for d in out if d.index == i) for i in (0, 1)] == ["a", "abcdefgh"]
    assert [len(chunks) for chunks in engine.lm.passes] == [2] * 2 + [1] * 6
    assert engine.requests.loop.counters.generation_tokens == out[-1].usage.completion_tokens == 10


def test_a_closed_stream_is_gone(tokenizer):
    engine = fake(tokenizer)
    stream = engine.stream([7] * 10, SEEDED)
    next(stream)
    stream.close()
    assert not engine.requests.loop.busy and len(engine.requests) == 0
    assert engine.requests.loop.pool.free_blocks == 64
