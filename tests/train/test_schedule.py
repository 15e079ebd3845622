"""Learning rates, against numbers of transformers' get_*_schedule_with_warmup (lr 3e-4, 10 of 100 steps of warm-up)."""

from __future__ import annotations

import pytest

from research.qwen.errors import ConfigError
from research.qwen.train.schedule import Schedule

# Step -> rate, printed by transformers 4.57.1.
COSINE = {
    0: 0.0,
    1: 2.9999999999999997e-05,
    2: 5.9999999999999995e-05,
    10: 0.0003,
    33: 0.0002541987555688496,
    50: 0.00017604722665003956,
    99: 9.137594713563568e-08,
}
LINEAR = {
    0: 0.0,
    2: 5.9999999999999995e-05,
    10: 0.0003,
    33: 0.00022333333333333333,
    50: 0.00016666666666666666,
    99: 3.3333333333333333e-06,
}


@pytest.mark.parametrize(("kind", "rates"), [("cosine", COSINE), ("linear", LINEAR)])
def test_rates_are_those_of_transformers(kind: str, rates: dict[int, float]) -> None:
    schedule = Schedule(3e-4, kind, warmup_ratio=0.1)
    for step, rate in rates.items():
        assert schedule.at(step, 100) == pytest.approx(rate, rel=1e-15, abs=0)


def test_constant_after_its_warm_up() -> None:
    schedule = Schedule(1e-5, "constant", warmup_steps=4)
    assert [schedule.at(step, 10) for step in range(6)] == pytest.approx(
        [0, 2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5]
    )


def test_the_published_recipe_warms_up_one_step_in_a_hundred_rounded_up() -> None:
    schedule = Schedule()
    assert [schedule.warmup(total) for total in (1, 100, 101, 1000)] == [1, 1, 2, 10]
    assert (schedule.lr, schedule.kind) == (1e-5, "cosine")


def test_no_warm_up() -> None:
    assert Schedule(1.0, warmup_ratio=0.0).at(0, 10) == 1.0
    assert Schedule(1.0, warmup_ratio=0.5, warmup_steps=0).at(0, 10) == 1.0


def test_a_least_rate() -> None:
    # get_cosine_with_min_lr_schedule_with_warmup: 0.9 * f + 0.1, here at f = 1, 1/2 and 0.
    schedule = Schedule(2.0, warmup_steps=0, min_ratio=0.1)
    assert [schedule.at(step, 10) for step in (0, 5, 10)] == pytest.approx([2.0, 1.1, 0.2])
    assert Schedule(2.0, "linear", warmup_steps=0, min_ratio=0.5).at(10, 10) == 1.0


def test_it_never_rises_after_the_warm_up_and_never_falls_below_zero() -> None:
    for kind in ("cosine", "linear", "constant"):
        rates = [Schedule(1.0, kind, warmup_steps=3).at(step, 20) for step in range(20)]
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert min(rates) >= 0


BAD = {
    "kind": ("step", "'step' is unknown; known: cosine, linear, constant"),
    "lr": (0.0, "learning rate must be above 0, got 0.0"),
    "warmup_ratio": (1.5, "warmup_ratio must be from 0 to 1, got 1.5"),
    "warmup_steps": (-1, "warmup_steps must be at least 0, got -1"),
    "min_ratio": (-0.1, "min_ratio must be from 0 to 1, got -0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ConfigError, match="learning rate|must be"):
        Schedule(**{name: value})
    with pytest.raises(ConfigError) as caught:
        Schedule(**{name: value})
    assert message in str(caught.value)


def test_not_a_number_is_no_rate() -> None:
    with pytest.raises(ConfigError, match="learning rate must be above 0, got nan"):
        Schedule(float("nan"))
    with pytest.raises(ConfigError, match="no meaning with a constant"):
        Schedule(kind="constant", min_ratio=0.1)
