"""The budget for prompts beside running answers, on machines whose step times are a formula."""

from __future__ import annotations

import random

import pytest

from research.qwen.decode.pace import LARGEST, REST, ROWS, SMALLEST, Pace


def read(pace, decoding, plain, token, steps=60):
    """Steps that read what the pace allows; the longest of the last ten, in plain steps."""
    budget, stretches = pace.budget, []
    for _ in range(steps):
        stretches.append(1 + token * budget / plain)
        budget = pace.note(decoding, budget, plain * stretches[-1])
    return max(stretches[-10:])


def settle(pace, decoding, plain, token, steps=60):
    """The same after plain steps."""
    for _ in range(5):
        pace.note(decoding, 0, plain)
    return read(pace, decoding, plain, token, steps)


def settle_costs(pace, cost, plain=0.06):
    """After plain steps of four sequences, prompts whose tokens cost what a formula says."""
    for _ in range(5):
        pace.note(4, 0, plain)
    budget, stretches = pace.budget, []
    for _ in range(60):
        seconds = plain + (cost(budget) if budget else 0.0)
        stretches.append(seconds / plain)
        budget = pace.note(4, budget, seconds)
    return max(stretches[-30:])


@pytest.mark.parametrize("plain, token", [(0.03, 0.003), (0.06, 0.001), (0.2, 0.01)])
def test_steps_stay_within_the_stretch(plain, token):
    pace = Pace(2.5)
    stretch = settle(pace, 4, plain, token)
    probing = (
        1.5 if pace.budget < 2 * SMALLEST else 1.0
    )  # no half of it is enough: then now and then more is read
    assert 2.5 - ROWS * token / plain < stretch <= 1 + 1.5 * probing
    assert (pace.budget + 4) % ROWS == 0 or pace.budget < ROWS, "whole groups of rows"


def test_slow_and_fast_machines_have_bounds():
    slow, fast = Pace(2.5), Pace(2.5)
    settle(slow, 1, 0.01, 1.0)
    settle(fast, 1, 0.01, 0.0)
    assert (slow.budget, fast.budget) == (SMALLEST, LARGEST - 1)  # 256 rows with the one that decodes


def test_it_follows_the_number_of_answers():
    pace = Pace(2.5)
    settle(pace, 16, 0.12, 0.002)
    assert pace.budget == 80  # 90 would do: in whole groups of rows
    pace.note(1, 0, 0.03)
    assert pace.budget == 15, "another prompt begins small: what lies before it in the cache is not known"
    assert settle(pace, 2, 0.03, 0.002) <= 2.5
    assert settle(pace, 16, 0.12, 0.002) <= 2.5
    assert pace.budget == 80


def test_the_budget_grows_in_steps():
    pace = Pace(2.5)
    pace.note(4, 0, 0.1)
    assert pace.budget == 12
    assert [pace.note(4, pace.budget, 0.1) for _ in range(5)] == [18, 27, 40, 60, 76]


def test_between_steps_that_read_some_only_decode():
    pace = Pace(2.5)
    pace.note(4, 0, 0.1)
    budgets = [pace.note(4, pace.budget, 0.1) for _ in range(REST)]
    assert all(budgets[:-1]) and budgets[-1] == 0
    assert pace.budget == 220
    assert pace.note(4, 0, 0.1) == 108, "the prompt goes on; first half as much, to see what tokens cost"
    assert pace.note(4, 108, 0.1) == 252


def test_the_smallest_budget_is_compared_with_a_larger_one():
    pace = Pace(2.0)
    settle(pace, 4, 0.06, 0.03, steps=REST)
    assert pace.budget == SMALLEST
    assert pace.note(4, 0, 0.06) == 6
    assert pace.note(4, 6, 0.06 + 0.18) == SMALLEST


def test_a_machine_that_gets_slower_does_not_stop_the_prompt():
    pace = Pace(2.5)
    settle(pace, 4, 0.06, 0.001)
    before = pace.budget
    slow = read(pace, 4, 0.6, 0.01, steps=140)
    assert slow <= 2.5
    assert pace.budget == before


def test_a_machine_that_gets_faster_is_known_from_the_next_plain_step_on():
    """Not five plain steps later: by the old ones, steps could take thrice as long as plain ones do now."""
    pace = Pace(2.0)
    settle(pace, 4, 0.12, 0.012, steps=4 * REST + 3)
    budget, stretches = pace.budget, []
    for _ in range(2 * REST):
        seconds = 0.06 + 0.006 * budget
        stretches.append(seconds / 0.06)
        budget = pace.note(4, budget, seconds)
    assert max(stretches) <= 2.9
    assert max(stretches[REST + 3 :]) <= 2.0


def test_where_reading_at_all_costs_much_a_few_tokens_more_are_read():
    """Not the smallest budget for ever: its step is hardly shorter."""
    pace = Pace(2.25)
    stretch = settle_costs(pace, lambda tokens: 0.08 + 0.001 * tokens)
    assert stretch <= 1 + 1.25 * 0.08 / 0.06 + 0.1
    assert pace.budget >= 12


def test_steps_are_as_long_as_allowed_where_half_of_it_is_for_reading_at_all():
    pace = Pace(2.0)
    assert 1.85 < settle_costs(pace, lambda tokens: 0.03 + 0.001 * tokens) <= 2.0


def test_a_prompt_behind_a_long_context_does_not_crawl():
    """Reading at all takes five plain steps: three times the smallest budget costs hardly more than the smallest."""
    pace = Pace(2.0)
    assert settle_costs(pace, lambda tokens: 0.3 + 0.0015 * tokens) <= 1 + 5 * 1.25 + 0.3
    assert pace.budget >= 3 * SMALLEST


def test_where_every_token_costs_much_it_is_the_smallest_budget():
    pace = Pace(2.25)
    settle_costs(pace, lambda tokens: 0.03 * tokens)
    assert pace.budget == SMALLEST


def test_one_disturbed_step_changes_nothing():
    pace = Pace(2.5)
    settle(pace, 4, 0.06, 0.001)
    for seconds in (9.0, 0.0):
        pace.note(4, 76, seconds)
        assert pace.budget == 76
    plain = Pace(2.5)
    for seconds in (0.06, 0.06, 9.0, 0.06):
        plain.note(4, 0, seconds)
    assert settle(plain, 4, 0.06, 0.001) <= 2.5


def test_a_chunk_with_a_price_of_its_own_stays_within_the_stretch():
    pace = Pace(2.5)
    pace.note(4, 0, 0.05)
    spent = 0.0
    for place in range(200):
        spent = 0.05 + 0.0002 * place + 0.001 * pace.budget
        pace.note(4, pace.budget, spent)
        assert spent <= 2.6 * 0.05
    assert spent > 2.3 * 0.05


def test_a_step_without_decoding_says_nothing():
    pace = Pace(2.5, start=16)
    assert pace.note(0, 512, 9.0) == 16
    assert pace.note(1, 16, 9.0) == 16, "no plain step known yet"


def test_a_disturbed_machine_is_no_reason_to_read_much_more():
    """A line through two disturbed points can promise anything."""
    noise, pace = random.Random(7), Pace(2.25)
    for _ in range(5):
        pace.note(4, 0, 0.085)
    budget, read_most = pace.budget, 0
    for _ in range(400):
        seconds = (0.085 + 0.012 * budget) * (1 + 0.25 * noise.random())
        budget = pace.note(4, budget, seconds)
        read_most = max(read_most, budget)
    assert read_most <= 1.25 * 1.25 * 0.085 * 1.25 / 0.012


def test_a_disturbed_second_point_is_no_beginning():
    """The only step with fewer tokens took ten times too long: that is not what reading at all costs."""
    pace = Pace(2.0)
    pace.note(4, 0, 0.06)
    budget = pace.budget
    for _ in range(REST):
        budget = pace.note(4, budget, 0.06 + 0.0018 * budget)
    steady = pace.budget
    budget = pace.note(4, 0, 0.06)
    assert 0 < budget < steady
    budget = pace.note(4, budget, 10 * (0.06 + 0.0018 * budget))
    for _ in range(REST - 1):
        assert budget <= steady
        budget = pace.note(4, budget, 0.06 + 0.0018 * budget)
