"""Biases, allowed and banned ids and the least length: against their definitions, and through the sampler."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.decode.params import SamplingParams
from research.qwen.decode.processors import allow_only
from research.qwen.decode.sampling import Sampler, probabilities
from research.qwen.errors import LogitsError

V = 12
ids = st.integers(0, V - 1)
requests = st.builds(
    SamplingParams,
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 0.0, 3.0, 100.0]), max_size=4),
    allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=6),
    bad_words_ids=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4),
    min_new_tokens=st.integers(0, 6),
)
history = st.lists(st.integers(0, 3), max_size=6)


def banned_by_definition(params, generated, end_ids):
    """The ids that may not come next, each rule spelt out for each id."""
    banned = set()
    for token in range(V):
        text = [*generated, token]
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            banned.add(token)
        if any(tuple(text[-len(word) :]) == word for word in params.bad_words_ids):
            banned.add(token)
    early = banned | set(end_ids) if len(generated) < params.min_new_tokens else banned
    return banned if len(early) == V else early


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(requests, history, history, st.sets(ids, max_size=3), st.integers(0, 2**32 - 1))
def test_equals_the_definition(params, prompt, generated, end_ids, seed):
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32)
    banned = banned_by_definition(params, generated, end_ids)
    if len(banned) == V:
        with pytest.raises(LogitsError, match="every token is banned"):
            probabilities(logits, params, prompt, generated, end_ids=end_ids)
        return
    biased = logits.astype(np.float64)
    for token, value in params.logit_bias.items():
        biased[token] += value
    biased[list(banned)] = -np.inf
    expected = np.exp(biased - biased.max())
    actual = probabilities(logits, params, prompt, generated, end_ids=end_ids)
    np.testing.assert_allclose(actual, expected / expected.sum(), rtol=1e-12)


def run(params, logits, steps, *, prompt=(0,), end_ids=(), processors=()):
    sampler = Sampler(params, prompt, end_ids=end_ids, processors=processors)
    seen, reported = list(prompt), []
    for _ in range(steps):
        token, logprob = sampler.next(logits, seen)
        seen.append(token)
        reported.append(logprob)
    return seen[len(prompt) :], reported


def test_greedy_answers():
    logits = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    greedy = {"temperature": 0}
    assert run(SamplingParams(**greedy, logit_bias={1: 5}), logits, 2)[0] == [1, 1]
    assert run(SamplingParams(**greedy, allowed_token_ids=[0, 2]), logits, 2)[0] == [2, 2]
    assert run(SamplingParams(**greedy, bad_words_ids=[[3, 3], [3, 2, 3]]), logits, 6)[0] == [
        3,
        2,
        2,
        3,
        2,
        2,
    ]
    assert run(SamplingParams(**greedy, min_new_tokens=2), logits, 4, end_ids=[3, 99])[0] == [2, 2, 3, 3]
    assert run(SamplingParams(**greedy, min_new_tokens=2), logits, 2, end_ids=range(4))[0] == [3, 3]
    assert logits.tolist() == [0, 1, 2, 3]


def test_a_bad_word_counts_from_the_answer_on():
    logits = np.array([0.0, 1.0], np.float32)
    params = SamplingParams(temperature=0, bad_words_ids=[[0, 1]])
    assert run(params, logits, 2, prompt=[0])[0] == [1, 1]


def test_a_bias_lifts_no_ban_of_a_processor():
    params = SamplingParams(temperature=0, logit_bias={1: 100})
    logits = np.array([0.0, 1.0], np.float32)
    assert run(params, logits, 1, processors=[allow_only([0])])[0] == [0]


def test_logprobs_ignore_all_of_it():
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    plain = run(SamplingParams(temperature=0, logprobs=3), logits, 1)[1][0]
    params = SamplingParams(
        temperature=0, logprobs=3, logit_bias={0: 9}, allowed_token_ids=[0, 1], bad_words_ids=[[1]]
    )
    (token,), (reported,) = run(params, logits, 1)
    assert token == reported.id == 0 and reported.top == plain.top
    assert reported.logprob == dict(plain.top)[0]  # the very same float


def test_seeded_draws_do_not_depend_on_the_rules_that_do_nothing():
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    plain = run(SamplingParams(seed=4), logits, 30)[0]
    idle = SamplingParams(seed=4, logit_bias={3: 0.0}, allowed_token_ids=range(50), bad_words_ids=[[7] * 40])
    assert run(idle, logits, 30)[0] == plain
