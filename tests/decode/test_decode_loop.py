"""The decoding loop on a fake model whose answers depend on every token in the cache."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import allow_only
from research.qwen.errors import LogitsError, PromptError, RequestError
from tests.fakes import FakeLM

GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


def run(loop, limit=2000):
    """Tokens and reason of every (key, choice)."""
    out = {}
    for _ in range(limit):
        if not loop.busy:
            return out
        for event in loop.step():
            tokens, _ = out.setdefault((event.key, event.choice), ([], None))
            tokens.append(event.token)
            out[event.key, event.choice] = (tokens, event.finish_reason)
    raise AssertionError("the loop does not come to an end")


def alone(prompt, params, **options):
    loop = GenerationLoop(FakeLM(), **options)
    key = loop.add(prompt, params)
    return run(loop)[key, 0]


def test_one_request_is_plain_greedy_decoding():
    lm, ids = FakeLM(), [1, 2, 3]
    tokens, reason = alone(ids, GREEDY)
    for token in tokens:
        places = np.arange(len(ids))
        lm.write(places, ids, 0, 1.0)
        assert token == int(lm._row(places, 1.0).argmax())
        ids = [*ids, token]
    assert len(tokens) == 6 and reason == "length"


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunked_prefill_gives_the_same(chunk):
    prompt = list(range(20))
    assert alone(prompt, GREEDY, prefill_chunk=chunk) == alone(prompt, GREEDY)


def test_prefill_budget_is_shared_and_decoding_goes_on():
    lm = FakeLM()
    loop = GenerationLoop(lm, prefill_chunk=4)
    loop.add([1, 2], GREEDY)
    loop.step()
    loop.add(list(range(10)), GREEDY)
    loop.add(list(range(10, 20)), GREEDY)
    run(loop)
    for chunks in lm.passes:
        assert sum(len(chunk.ids) for chunk in chunks if len(chunk.ids) > 1) <= 4
    mixed = [chunks for chunks in lm.passes if {len(chunk.ids) for chunk in chunks} >= {1, 4}]
    assert mixed, "a running sequence waited for another's prompt"


def test_without_cache_the_text_is_the_same():
    for prompt in ([1], list(range(12))):
        assert alone(prompt, GREEDY, use_cache=False) == alone(prompt, GREEDY)
    lm = FakeLM()
    loop = GenerationLoop(lm, use_cache=False)
    loop.add([1, 2, 3], GREEDY)
    run(loop)
    assert all(chunk.start == 0 for chunks in lm.passes for chunk in chunks)


def test_end_ids_and_ignore_eos():
    tokens, _ = alone([1, 2, 3], GREEDY)
    loop = GenerationLoop(FakeLM())
    first = loop.add([1, 2, 3], GREEDY, [tokens[2]])
    second = loop.add(
        [1, 2, 3], SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True), [tokens[2]]
    )
    third = loop.add(
        [1, 2, 3], SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=[tokens[1]]), [tokens[0]]
    )
    done = run(loop)
    assert done[first, 0] == (tokens[:3], "stop")
    assert done[second, 0] == (tokens, "length")
    assert done[third, 0] == (tokens[:2], "stop")


def test_stop_sequences_match_new_ids_only_and_stay():
    tokens, _ = alone([1, 2, 3], GREEDY)
    loop = GenerationLoop(FakeLM())
    hit = loop.add([1, 2, 3], GREEDY, stop_sequences=[tokens[1:3]])
    across = loop.add([1, 2, 3], GREEDY, stop_sequences=[[3, tokens[0]]])  # begins in the prompt
    done = run(loop)
    assert done[hit, 0] == (tokens[:3], "stop")
    assert done[across, 0] == (tokens, "length")


def test_the_context_is_an_end():
    tokens, reason = alone([1] * 40, SamplingParams(temperature=0, max_new_tokens=None))
    assert (len(tokens), reason) == (8, "length")


def test_a_cache_smaller_than_the_context_is_an_end():
    lm = FakeLM(num_blocks=4, block_size=4)
    loop = GenerationLoop(lm)
    keys = [loop.add([1] * 10, SamplingParams(temperature=0, max_new_tokens=n)) for n in (None, 20)]
    done = run(loop)
    want, _ = alone([1] * 10, SamplingParams(temperature=0, max_new_tokens=6))
    assert [done[key, 0] for key in keys] == [(want, "length")] * 2
    assert loop.pool.free_blocks == 4


def test_choices_differ_and_repeat():
    params = SamplingParams(temperature=2.0, seed=5, n=3, max_new_tokens=5)
    results = []
    for _ in range(2):
        loop = GenerationLoop(FakeLM())
        loop.add([1, 2], params)
        results.append(run(loop))
    assert results[0] == results[1]
    assert len({tuple(tokens) for tokens, _ in results[0].values()}) == 3


def test_processors_see_all_ids():
    seen = []

    def watch(ids, row):
        seen.append(list(ids))
        return row

    loop = GenerationLoop(FakeLM())
    key = loop.add([1, 2], GREEDY, processors=[watch, allow_only([7])])
    assert run(loop)[key, 0] == ([7] * 6, "length")
    assert seen[0] == [1, 2] and seen[-1] == [1, 2] + [7] * 5


def test_preemption_recomputes_and_changes_nothing():
    prompts = [[i] * 10 for i in range(1, 5)]  # 4 x 5 blocks at the end, 12 in the pool
    lm = FakeLM(num_blocks=12)
    loop = GenerationLoop(lm)
    keys = [loop.add(prompt, SamplingParams(temperature=0, max_new_tokens=10)) for prompt in prompts]
    done = run(loop)
    for key, prompt in zip(keys, prompts, strict=True):
        assert done[key, 0] == alone(prompt, SamplingParams(temperature=0, max_new_tokens=10))
    recomputed = [c for chunks in lm.passes for c in chunks if c.start == 0 and len(c.ids) > 10]
    assert recomputed, "nothing was preempted: the test does not test"
    assert all(chunk.alpha == 3.0 for chunk in recomputed)
    assert loop.pool.free_blocks == 12


def test_a_preempted_sequence_goes_before_those_that_never_ran():
    loop = GenerationLoop(FakeLM(num_blocks=6, block_size=4))
    keys = [loop.add([i] * 8, SamplingParams(temperature=0, max_new_tokens=10)) for i in (1, 2, 3)]
    ends = []
    while loop.busy:
        ends += [event.key for event in loop.step() if event.finish_reason]
        waiting = [sequence.key for sequence in loop.schedule.waiting]
        assert waiting == sorted(waiting)
    assert ends == keys


def test_failure_frees_everything_and_goes_on():
    lm = FakeLM()
    loop = GenerationLoop(lm)
    loop.add([1, 2], GREEDY)
    loop.add([3], GREEDY)
    loop.step()
    lm.fail_at = 0
    with pytest.raises(RuntimeError, match="broken"):
        loop.step()
    assert not loop.busy and loop.pool.free_blocks == lm.num_blocks
    lm.fail_at = None
    key = loop.add([1, 2], GREEDY)
    assert run(loop)[key, 0] == alone([1, 2], GREEDY)


def test_broken_logits_are_an_error():
    lm = FakeLM()
    lm._row = lambda places, alpha: np.full(64, np.nan, np.float32)
    loop = GenerationLoop(lm)
    loop.add([1], GREEDY)
    with pytest.raises(LogitsError, match="NaN"):
        loop.step()
    assert loop.pool.free_blocks == lm.num_blocks


def test_refused_at_once():
    loop = GenerationLoop(FakeLM(num_blocks=4, block_size=4))
    with pytest.raises(PromptError, match="empty"):
        loop.add([], GREEDY)
    with pytest.raises(PromptError, match="16 tokens.*the cache holds 16.*4 blocks of 4"):
        loop.add([1] * 16, GREEDY)
    with pytest.raises(PromptError, match="48 tokens.*the context holds 48"):
        loop.add([1] * 48, GREEDY)
    for bad in (64, -1):
        with pytest.raises(PromptError, match=f"token id {bad} is outside the vocabulary of 64 rows"):
            loop.add([1, bad], GREEDY)
    assert not loop.busy
    with pytest.raises(RequestError, match="prefill_chunk"):
        GenerationLoop(FakeLM(), prefill_chunk=0)
