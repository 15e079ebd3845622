"""A small soak of the server as a process: requests of all kinds at once, some given up, some wrong, then SIGTERM."""

from __future__ import annotations

import pytest

from scripts.bench_serve_process import Server
from scripts.bench_serve_soak import Found, Soak, end_under_load, soak_demo


def quiet(text: str) -> None:
    """Progress nobody reads."""


def check(found: Found) -> None:
    """No problems, and every kind of request was there."""
    assert not found.problems, "\n".join(found.problems[:5])
    assert found.statuses.keys() <= {200, 400, 404, 413, 415} and found.statuses[400]
    for kind in ("streamed chat/completions", "whole chat/completions", "streamed completions", "malformed"):
        assert found.kinds[kind]
    assert found.kinds["left, in the middle"]


@pytest.mark.mindspore
def test_the_demo_model_under_load_and_at_its_end() -> None:
    found = soak_demo(300, 5, quiet, phases=4)
    check(found)
    assert found.kinds["at the end: streams that finished"] >= 6
    ended = ("at the end: streams that finished", "at the end: streams with an error event")
    assert sum(found.kinds[kind] for kind in ended) == 16


@pytest.mark.slow
def test_a_fake_model_under_load_and_at_its_end() -> None:
    with Server("--grace", "0.5", module="tests.serve.fake_server", FAKE_STEP="0.001") as server:
        soak = Soak(server, 120, 3, pause=0.05)
        soak.run(2, quiet)
        end_under_load(server, soak.found, [5] * 4 + [3900] * 6, grace=0.5)
    check(soak.found)
    assert soak.found.kinds["at the end: streams with an error event"] == 6
