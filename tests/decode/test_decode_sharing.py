"""Shared prefixes, scores of prompts, failures of one request, and what else servers ask of the loop."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.processors import allow_only
from research.qwen.errors import LogitsError, PromptError, RequestError
from tests.decode.test_decode_loop import GREEDY, alone, run
from tests.fakes import FakeLM


def test_a_mixed_step_reads_less_of_a_prompt():
    lm = FakeLM()
    loop = GenerationLoop(lm, prefill_chunk=100, mixed_chunk=3)
    loop.add([1, 2], GREEDY)
    loop.step()
    loop.add(list(range(30)), GREEDY)
    run(loop)
    sizes = [sorted(len(chunk.ids) for chunk in chunks) for chunks in lm.passes]
    assert sizes[1:6] == [[1, 3]] * 5, "while the first one decodes"
    assert sizes[6] == [30 - 15], "alone again"


def test_the_second_prompt_with_the_same_beginning_computes_only_its_end():
    lm = FakeLM(num_blocks=30)
    loop = GenerationLoop(lm, prefix_caching=True)
    system = list(range(18))
    loop.add([*system, 40, 41], GREEDY)
    run(loop)
    lm.passes.clear()
    key = loop.add([*system, 50], GREEDY)
    events = [event for _ in range(6) for event in loop.step()]
    assert [event.token for event in events] == alone([*system, 50], GREEDY)[0]
    assert {event.cached_tokens for event in events} == {16}
    assert [chunk.start for chunk in lm.passes[0]] == [16] and events[0].key == key


def test_the_whole_prompt_in_the_cache_still_gives_the_last_row():
    lm = FakeLM()
    loop = GenerationLoop(lm, prefix_caching=True)
    for _ in range(2):
        key = loop.add(list(range(16)), GREEDY)
        assert run(loop)[key, 0] == alone(list(range(16)), GREEDY)
    assert loop.counters.prefix_hits == 12


def test_answers_are_beginnings_too():
    loop = GenerationLoop(FakeLM(), prefix_caching=True)
    prompt = list(range(7))
    key = loop.add(prompt, GREEDY)
    turn = [*prompt, *run(loop)[key, 0][0], 9]
    key = loop.add(turn[:9], GREEDY)  # 7 + 2: a factor of its own begins with 9 tokens
    assert loop.step()[0].cached_tokens == 0
    run(loop)
    loop.add(turn[:8], GREEDY)
    assert loop.step()[0].cached_tokens == 4


def test_of_two_at_once_the_second_waits_for_the_blocks_of_the_first():
    lm = FakeLM(num_blocks=30)
    loop = GenerationLoop(lm, prefix_caching=True, prefill_chunk=8)
    prompt = list(range(20))
    keys = [loop.add(prompt, GREEDY), loop.add([*prompt, 21], GREEDY)]
    done = run(loop)
    assert [done[key, 0] for key in keys] == [alone(prompt, GREEDY), alone([*prompt, 21], GREEDY)]
    assert loop.counters.prefix_hits == 20
    assert loop.counters.computed_tokens == 20 + 1 + 2 * 5


def test_choices_share_the_prompt():
    params = SamplingParams(temperature=2.0, seed=5, n=4, max_new_tokens=3)
    lm = FakeLM(num_blocks=30)
    loop = GenerationLoop(lm, prefix_caching=True)
    key = loop.add(list(range(18)), params)
    done = run(loop)
    plain = GenerationLoop(FakeLM(num_blocks=30))
    assert plain.add(list(range(18)), params) == key and run(plain) == done
    assert loop.counters.computed_tokens == 18 + 3 * 2 + 4 * 2
    assert (loop.counters.prompt_tokens, loop.counters.prefix_hits) == (18, 48)


def test_salts_and_factors_share_nothing():
    loop = GenerationLoop(FakeLM(), prefix_caching=True)
    for salt in ("", "a", "b", "a"):
        loop.add([1, 2, 3, 4, 5], GREEDY, cache_salt=salt)
        run(loop)
    assert loop.counters.prefix_hits == 4, "only the second a"
    loop.add([1, 2, 3, 4, 5, 6, 7, 8, 9], GREEDY)  # another NTK factor
    run(loop)
    assert loop.counters.prefix_hits == 4


def test_who_waited_takes_over_when_the_first_is_cancelled():
    lm = FakeLM(num_blocks=30)
    loop = GenerationLoop(lm, prefix_caching=True, prefill_chunk=6)
    prompt = list(range(20))
    first, second = loop.add(prompt, GREEDY), loop.add(prompt, GREEDY)
    loop.step()
    loop.cancel(first)
    assert run(loop) == {(second, 0): alone(prompt, GREEDY)}
    assert loop.counters.prefix_hits == 4, "the block that was full"


def prompt_scores(prompt, top, **options):
    loop = GenerationLoop(FakeLM(num_blocks=40), **options)
    loop.add(prompt, SamplingParams(temperature=0, prompt_logprobs=top, max_new_tokens=2))
    events = []
    while loop.busy:
        events += loop.step()
    assert events[1].prompt_logprobs == ()
    return events[0].prompt_logprobs


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prompt_logprobs_are_the_log_softmax_of_every_row(chunk):
    lm, prompt = FakeLM(), list(range(11))
    first, *rest = prompt_scores(prompt, 2, prefill_chunk=chunk)
    assert first is None and [entry.id for entry in rest] == prompt[1:]
    places = np.arange(len(prompt))
    lm.write(places, prompt, 0, 3.0)
    for place, entry in enumerate(rest, 1):
        row = lm._row(places[:place], 3.0).astype(np.float64)
        want = row - np.log(np.exp(row).sum())
        assert entry.logprob == pytest.approx(want[prompt[place]], abs=1e-5)
        assert [i for i, _ in entry.top] == list(np.argsort(-want)[:2])
        assert dict(entry.top).get(entry.id, entry.logprob) == entry.logprob, "the same float"


def test_prompt_logprobs_do_not_come_from_a_cached_prompt():
    loop = GenerationLoop(FakeLM(), prefix_caching=True)
    prompt = list(range(11))
    loop.add(prompt, GREEDY)
    run(loop)
    loop.add(prompt, SamplingParams(temperature=0, prompt_logprobs=2, max_new_tokens=1))
    (event,) = loop.step()
    assert event.prompt_logprobs == prompt_scores(prompt, 2) and event.cached_tokens == 0


def test_rows_of_prompt_logits_are_bounded():
    lm = FakeLM(num_blocks=600, max_length=1000)
    loop = GenerationLoop(lm, prefill_chunk=1000)
    keys = [
        loop.add([i] * 300, SamplingParams(temperature=0, prompt_logprobs=0, max_new_tokens=0))
        for i in (1, 2)
    ]
    scored = {}
    while loop.busy:
        scored.update((event.key, event.prompt_logprobs) for event in loop.step())
    assert [len(scored[key]) for key in keys] == [300, 300]
    assert max(sum(chunk.logits for chunk in chunks) for chunks in lm.passes) == 256


def test_no_new_tokens():
    lm = FakeLM()
    loop = GenerationLoop(lm)
    nothing = SamplingParams(max_new_tokens=0, n=2)
    loop.add([5] * 48, nothing)  # as long as the context
    events = loop.step() + loop.step()
    assert [(e.choice, e.token, e.finish_reason) for e in events] == [(0, -1, "length"), (1, -1, "length")]
    assert not loop.busy and loop.counters.generation_tokens == 0
    assert all(chunk.logits == 0 for chunks in lm.passes for chunk in chunks)
    with pytest.raises(PromptError, match="49 tokens"):
        loop.add([5] * 49, nothing)


def test_a_least_length():
    tokens, _ = alone([1, 2, 3], GREEDY)
    params = SamplingParams(temperature=0, max_new_tokens=6, min_new_tokens=4)
    loop = GenerationLoop(FakeLM())
    banned = loop.add([1, 2, 3], params, [tokens[1]])
    ended = loop.add([1, 2, 3], params, stop_sequences=[tokens[:1], tokens[3:4]])
    done = run(loop)
    assert tokens[1] not in done[banned, 0][0][:3] and len(done[banned, 0][0]) >= 4
    assert done[ended, 0] == (tokens[:4], "stop")


def test_processors_of_a_choice_have_their_own_state():
    def make(choice):
        return [allow_only([10 + choice])]

    loop = GenerationLoop(FakeLM())
    key = loop.add([1], SamplingParams(n=3, max_new_tokens=2), processors=make)
    assert {place: tokens for place, (tokens, _) in run(loop).items()} == {
        (key, choice): [10 + choice] * 2 for choice in range(3)
    }


def fail(ids, row):
    raise ZeroDivisionError("a processor's own fault")


def test_a_failing_processor_ends_its_request_only():
    loop = GenerationLoop(FakeLM(), isolate=True, prefix_caching=True)
    bad = loop.add([1, 2], SamplingParams(n=3, temperature=0), processors=lambda c: [fail] if c == 1 else [])
    good = loop.add([1, 2, 3], GREEDY)
    events = loop.step()
    assert [(e.key, e.choice, type(e.error)) for e in events if e.error] == [(bad, 1, ZeroDivisionError)]
    assert [e.choice for e in events if e.key == bad] == [0, 1], "no event of the request after its error"
    tokens = [e.token for e in events if e.key == good] + run(loop)[good, 0][0]
    assert tokens == alone([1, 2, 3], GREEDY)[0] and loop.pool.free_blocks == 16


def test_damaged_rows_end_their_request_and_are_not_found_again():
    lm = FakeLM()
    loop = GenerationLoop(lm, isolate=True, prefix_caching=True)
    honest = lm._row
    lm._row = lambda places, alpha: np.full(64, np.nan, np.float32)
    loop.add([1, 2, 3, 4, 5], GREEDY)
    (event,) = loop.step()
    assert isinstance(event.error, LogitsError) and not loop.busy
    lm._row = honest
    key = loop.add([1, 2, 3, 4, 5], GREEDY)
    assert run(loop)[key, 0] == alone([1, 2, 3, 4, 5], GREEDY)
    assert loop.counters.prefix_hits == 0


def test_a_failed_pass_ends_those_in_it_and_the_others_go_on():
    lm = FakeLM()
    loop = GenerationLoop(lm, isolate=True, prefix_caching=True, max_batch=2)
    loop.add([9, 2, 3, 4, 5], GREEDY)
    run(loop)
    assert loop.pool.known_blocks > 0
    keys = [loop.add([i, 2, 3, 4, 5], GREEDY) for i in (1, 2, 3)]
    lm.fail_at = 0
    events = loop.step()
    assert [(event.key, str(event.error)) for event in events] == [(key, "broken") for key in keys[:2]]
    assert loop.counters.failed_passes == 1 and loop.pool.known_blocks == 0
    lm.fail_at = None
    assert run(loop) == {(keys[2], 0): alone([3, 2, 3, 4, 5], GREEDY)}


def test_an_interruption_is_nobodys_event():
    lm = FakeLM()
    loop = GenerationLoop(lm, isolate=True)
    loop.add([1], GREEDY)
    lm.forward = lambda chunks: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert not loop.busy and loop.pool.free_blocks == lm.num_blocks


def test_blocks_for_other_work_come_from_those_admitted_last():
    lm = FakeLM(num_blocks=6)
    loop = GenerationLoop(lm)
    keys = [loop.add([i] * 7, GREEDY) for i in (1, 2)]
    loop.step()
    blocks = loop.take_blocks(4)
    assert [s.key for s in loop.schedule.running] == keys[:1]
    loop.pool.free(blocks)
    done = run(loop)
    assert done[keys[1], 0][0] == alone([2] * 7, GREEDY)[0][1:]
    with pytest.raises(PromptError, match="7 cache blocks are needed, 6 of 6"):
        loop.take_blocks(7)


def test_parameters_that_name_unknown_ids_are_refused_at_once():
    loop = GenerationLoop(FakeLM())
    for field in ({"logit_bias": {64: 1.0}}, {"allowed_token_ids": [64]}, {"bad_words_ids": [[1, 64]]}):
        with pytest.raises(RequestError, match=f"{next(iter(field))}: token id 64 is outside"):
            loop.add([1], SamplingParams(**field))
    assert not loop.busy
