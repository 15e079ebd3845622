"""The sampler: golden distributions, an independent slow computation, seeds, and broken rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.decode import sampling
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import PenaltyState, Sampler, candidates, probabilities
from research.qwen.errors import LogitsError, QwenError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sampling.npz"


def slow_probabilities(logits, params, prompt=(), generated=()):
    """The definition, token by token, with a full sort: shares nothing with the module under test."""
    scores = [float(x) for x in logits]
    for token in {*prompt, *generated}:
        r = params.repetition_penalty
        penalised = scores[token] * r if scores[token] < 0 else scores[token] / r
        scores[token] = max(penalised, -1.7976931348623157e308) if scores[token] > -np.inf else -np.inf
    for token in set(generated):
        scores[token] -= params.presence_penalty + params.frequency_penalty * list(generated).count(token)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.greedy:
        return np.eye(len(scores))[order[0]]
    if params.top_k:
        order = order[: params.top_k]
    with np.errstate(over="ignore"):
        weight = {i: np.exp((scores[i] - scores[order[0]]) / np.float64(params.temperature)) for i in order}
    order.sort(key=lambda i: (-weight[i], i))
    if params.top_p < 1:
        target, mass, kept = params.top_p * sum(weight.values()) * (1 - 1e-12), 0.0, []
        for i in order:
            kept.append(i)
            mass += weight[i]
            if mass >= target:
                break
        order = kept
    order = [i for i in order if weight[i] >= params.min_p]
    full, total = np.zeros(len(scores)), sum(weight[i] for i in order)
    for i in order:
        full[i] = weight[i] / total
    return full


def test_golden():
    golden = np.load(FIXTURE)
    for (penalty, temperature, top_k, top_p), expected in zip(golden["params"], golden["probs"], strict=True):
        params = SamplingParams(
            repetition_penalty=penalty, temperature=temperature, top_k=int(top_k), top_p=top_p
        )
        for logits, context, row in zip(golden["logits"], golden["context_ids"], expected, strict=True):
            actual = probabilities(logits, params, context.tolist())
            np.testing.assert_allclose(actual, row, rtol=0, atol=1e-6)
            assert ((actual > 0) == (row > 0)).all()


rows = st.one_of(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60),
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=60),  # many ties
    st.lists(st.sampled_from([-3e38, 0.0, 3e38, -np.inf, 1.0]), min_size=2, max_size=20).filter(
        lambda row: max(row) > -np.inf
    ),
)
settings_of_a_request = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 1e-3, 0.7, 1.0, 3.0, 1e6]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.8, 0.95, 1 - 1e-9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.1, 0.5, 1e300]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -2.0]),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None)
@given(rows, settings_of_a_request, st.data())
def test_equals_the_definition(row, params, data):
    ids = st.lists(st.integers(0, len(row) - 1), max_size=12)
    prompt, generated = data.draw(ids), data.draw(ids)
    logits = np.array(row, np.float32)
    with np.errstate(over="ignore"):
        expected = slow_probabilities(logits, params, prompt, generated)
    actual = probabilities(logits, params, prompt, generated)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.8},
        {"top_p": 0.9999},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000},
        {"top_p": 0.5, "min_p": 0.1},
    ],
)
def test_large_vocabulary_equals_the_definition(spread, values):
    """Large enough for the block bound and every level of buckets; rounded, so that ties fall on the cuts."""
    logits = np.random.default_rng(3).normal(size=20_011, scale=spread).astype(np.float16).astype(np.float32)
    params = SamplingParams(**values)
    np.testing.assert_allclose(
        probabilities(logits, params), slow_probabilities(logits, params), rtol=1e-9, atol=1e-15
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_top_indices(size, levels, seed):
    values = np.random.default_rng(seed).integers(0, levels, size=size * 10).astype(np.float64)
    k = 1 + seed % len(values)
    expected = np.sort(np.argsort(-values, kind="stable")[:k])
    np.testing.assert_array_equal(sampling.top_indices(values, k), expected)


@settings(max_examples=100, deadline=None)
@given(rows, settings_of_a_request, st.floats(0, 1, exclude_max=True))
def test_draw_follows_the_distribution(row, params, u):
    """The token drawn at u is the one whose interval of the cumulative distribution, in id order, holds u."""
    logits = np.array(row, np.float32)
    full = probabilities(logits, params)
    ids, weights = candidates(logits.astype(np.float64), params)
    token = sampling.draw(ids, weights, u)
    assert full[token] > 0
    edges = np.concatenate([[0.0], full.cumsum()])
    assert edges[token] - 1e-12 <= u <= edges[token + 1] + 1e-12


def test_draw_at_the_edges_never_picks_weightless_tokens():
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    assert sampling.draw(None, weights, 0.0) == 1
    assert sampling.draw(None, weights, 0.25) == 3
    assert sampling.draw(None, weights, np.nextafter(1.0, 0.0)) == 3
    assert sampling.draw(np.array([4, 9, 11, 12, 14]), weights, 0.999) == 12


@pytest.mark.slow
def test_frequencies_of_a_seeded_run():
    """20,000 draws: every count within five standard deviations."""
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    expected = probabilities(logits, SamplingParams())
    sampler = Sampler(SamplingParams(seed=11), [])
    counts = np.bincount([sampler.next(logits, [])[0] for _ in range(20_000)], minlength=4)
    deviation = np.sqrt(20_000 * expected * (1 - expected))
    assert (np.abs(counts - 20_000 * expected) < 5 * deviation).all()


def test_seeds_choices_and_steps_differ_and_repeat():
    values = {
        (s, c, t): sampling.uniform(s, c, t) for s in (0, 1, 2**63) for c in range(4) for t in range(50)
    }
    assert len(set(values.values())) == len(values)
    assert all(0 <= v < 1 for v in values.values())
    assert sampling.uniform(1, 2, 3) == values[1, 2, 3]
    assert sampling.uniform(2**63, 0, 0) != sampling.uniform(2**63 + 1, 0, 0)
    assert (
        sampling.uniform(7, 0, 1) == 0.0828426870273763
    )  # pinned: a change would change every seeded answer
    assert sampling.uniform(-1, 0, 0) == sampling.uniform(2**64 - 1, 0, 0)


def test_fresh_entropy_without_a_seed():
    assert Sampler(SamplingParams(), []).seed != Sampler(SamplingParams(), []).seed
    assert Sampler(SamplingParams(seed=0), []).seed == 0
    assert Sampler(SamplingParams(seed=5), [], seed=6).seed == 6


def test_incremental_penalties_equal_a_fresh_state():
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300)
    prompt, state, generated = [3, 3, 250], PenaltyState([3, 3, 250], params), []
    for token in rng.integers(0, 300, size=400).tolist():
        state.add(token)
        generated.append(token)
    scores = logits.copy()
    state.apply(scores)
    full = slow_probabilities(logits, params, prompt, generated)
    ids, weights = candidates(scores, SamplingParams())
    np.testing.assert_allclose(weights / weights.sum(), full, rtol=1e-9)


def test_the_sampler_counts_its_own_tokens():
    """Greedy with a frequency penalty of 2 alternates between two nearly equal tokens."""
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=2.0), [])
    logits = np.array([1.0, 0.0, -9.0], np.float32)
    assert [sampler.next(logits, [])[0] for _ in range(5)] == [0, 1, 0, 1, 0]
    assert logits.tolist() == [1.0, 0.0, -9.0]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(top_p=0.8), SamplingParams()]
)
@pytest.mark.parametrize(
    ("row", "words"),
    [([1.0, np.nan], "NaN"), ([np.inf, 0.0], r"\+inf"), ([-np.inf, -np.inf], "every token is banned")],
)
def test_broken_rows_are_errors(params, row, words):
    logits = np.array(row, np.float32)
    with pytest.raises(LogitsError, match=words):
        Sampler(params, []).next(logits, [])
    with pytest.raises(QwenError, match=words):
        probabilities(logits, params)


def test_a_broken_row_is_not_hidden_by_a_processor():
    with pytest.raises(LogitsError, match="NaN"):
        Sampler(SamplingParams(), [], processors=[sampling.allow_only([0])]).next(np.array([0.0, np.nan]), [])


def test_processors():
    seen = []

    def spy(ids, row):
        seen.append(list(ids))
        assert row[2] == pytest.approx(1.0)  # after the repetition penalty, before the temperature
        return row

    params = SamplingParams(temperature=0.5, repetition_penalty=2.0)
    logits = np.array([5.0, 4.0, 2.0], np.float32)
    full = probabilities(logits, params, [2], processors=[spy, sampling.allow_only([1, 2])])
    assert seen == [[2]] and full[0] == 0.0
    assert full[1] / full[2] == pytest.approx(np.exp((4.0 - 1.0) / 0.5))
    with pytest.raises(LogitsError, match=r"returned shape \(1,\), expected \(3,\)"):
        probabilities(logits, params, processors=[lambda ids, row: row[:1]])


def test_logprobs_come_from_the_unmodified_logits():
    logits = np.array([1.0, 3.0, 3.0, 0.0, -1.0], np.float32)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=0, repetition_penalty=100.0, logprobs=3)
    token, logprob = Sampler(params, [1, 2], processors=[sampling.allow_only([0, 3])]).next(logits, [1, 2])
    assert token == logprob.id == 0
    assert logprob.logprob == pytest.approx(exact[0])
    assert [i for i, _ in logprob.top] == [1, 2, 0]  # best first, lower id first on a tie
    assert [v for _, v in logprob.top] == pytest.approx(exact[[1, 2, 0]])
    assert sampling.token_logprob(logits, 4, 0).top == ()
    assert sampling.token_logprob(np.array([3e38, -3e38], np.float32), 0, 2).logprob == 0.0
    assert Sampler(SamplingParams(), []).next(logits, [])[1] is None
