"""The budget for prompts beside running answers, on machines whose step times are a formula."""

from __future__ import annotations

import pytest

from research.qwen.decode.pace import LARGEST, SMALLEST, Pace


def settle(pace, decoding, plain, token, steps=60):
    """Plain steps, then steps that read what the pace allows; the stretch of the last one."""
    for _ in range(5):
        pace.note(decoding, 0, plain)
    for _ in range(steps):
        budget = pace.budget
        seconds = plain + token * budget
        pace.note(decoding, budget, seconds)
    return seconds / plain


@pytest.mark.parametrize("plain, token", [(0.03, 0.003), (0.06, 0.001), (0.2, 0.01)])
def test_steps_stay_within_the_stretch(plain, token):
    pace = Pace(2.5)
    assert 2.3 < settle(pace, 4, plain, token) <= 2.5
    assert pace.budget == pytest.approx(1.5 * plain / token, abs=1.5)


def test_slow_and_fast_machines_have_bounds():
    slow, fast = Pace(2.5), Pace(2.5)
    settle(slow, 1, 0.01, 1.0)
    settle(fast, 1, 0.01, 0.0)
    assert (slow.budget, fast.budget) == (SMALLEST, LARGEST)


def test_it_follows_the_number_of_answers():
    pace = Pace(2.5)
    settle(pace, 16, 0.12, 0.002)
    assert pace.budget == 90
    pace.note(1, 0, 0.03)
    assert pace.budget < 30
    assert settle(pace, 2, 0.03, 0.002) <= 2.5
    pace.note(16, 0, 0.12)
    assert pace.budget > 80


def test_a_step_without_decoding_says_nothing():
    pace = Pace(2.5, start=16)
    assert pace.note(0, 512, 9.0) == 16
    assert pace.note(1, 16, 9.0) == 16, "no plain step known yet"
