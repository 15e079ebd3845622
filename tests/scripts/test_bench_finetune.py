"""The arithmetic of the fine-tuning benchmark; no speed is judged here."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.bench_finetune import AGREE, ROWS, SHORT, judge, make_batches, targets, text_of


def said(row, seconds, peak=1024.0, loss=2.0):
    """A round in which every step of a column takes the same time, but for the first."""
    steps = {}
    for column, each in zip(row.columns, seconds, strict=True):
        made = [
            {"seconds": s, "processor_s": s, "tokens": 100, "peak_mib": peak, "loss": loss}
            for s in (99.0, each, each)
        ]
        steps[column.label] = {"facts": {"version": "1"}, "steps": made}
    return steps


def test_ratios_are_taken_within_a_round_and_without_the_first_step():
    row = ROWS["full"]
    found = judge(row, [said(row, (1.0, 2.0)), said(row, (3.0, 4.0))])
    assert found["seconds"] == {"ours": [1.0, 3.0], "theirs": [2.0, 4.0]}
    assert found["seconds_ratio"] == {"theirs": [0.5, 0.75]}
    assert found["tokens_per_s"]["ours"] == [100.0, pytest.approx(100 / 3)]
    assert found["loss_difference"] == 0.0


@pytest.mark.parametrize(("seconds", "passed"), [((1.0, 1.0), True), ((1.1, 1.0), False)])
def test_targets_of_time(seconds, passed):
    row = ROWS["lora"]
    time, memory, losses = targets({"lora": judge(row, [said(row, seconds)])})
    assert (time["passed"], memory["passed"], losses["passed"]) == (passed, True, True)
    assert losses["bound"] == AGREE


def test_a_loss_that_differs_fails():
    row = ROWS["full"]
    one = said(row, (1.0, 1.0))
    one["theirs"]["steps"][2]["loss"] += 0.01
    assert not targets({"full": judge(row, [one])})[2]["passed"]


def test_packing_is_held_against_every_other_column():
    row = ROWS["short"]
    found = {"short": judge(row, [said(row, (1.0, 1.9, 2.0, 8.0))])}
    assert [(t["value"], t["passed"]) for t in targets(found)] == [(1.9, False), (2.0, True), (8.0, True)]
    table = text_of({"rows": found, "targets": targets(found)})
    assert all(column.label in table for column in SHORT) and "FAIL" in table


@pytest.mark.parametrize("texts", ["whole", "packed", "padded", "padded-max"])
def test_batches_of_all_kinds(tmp_path, texts):
    files = make_batches(tmp_path, texts, 2, 256, 3)
    assert len(files) == 3
    share = []
    for file in files:
        with np.load(file) as found:
            assert {found[name].shape for name in found.files} == {found["ids"].shape}
            assert len(found["ids"]) == 2
            share.append((found["segments"] >= 0).mean())
            if texts != "padded":
                assert found["ids"].shape[1] == 256
    assert {"whole": min(share) == 1, "packed": min(share) > 0.7, "padded": max(share) <= 1}.get(
        texts, max(share) < 0.5
    )
