"""Rows of a batch become flattened texts and places for attention."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.model.training_rows import MASKED, count_targets, flatten
from tests.model.training_cases import packed, rows_of

CONFIG = QwenConfig(
    vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, kv_channels=4
)
PACKED = [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9]]]


def test_padding_is_dropped_and_texts_follow_one_another():
    rows = flatten(packed(PACKED, width=7), CONFIG)
    assert rows.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert rows.lengths.tolist() == [3, 2, 4]
    assert rows.bounds.tolist() == [0, 3, 5, 9]
    assert rows.places.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]


def test_every_token_but_the_last_of_a_text_predicts_the_next():
    batch = packed(PACKED)
    rows = flatten(batch, CONFIG)
    assert rows.rows.tolist() == [0, 1, 3, 5, 6, 7]
    assert rows.targets.tolist() == [2, 3, 5, 7, 8, 9]
    assert rows.tokens == count_targets(batch) == 6


def test_ignored_labels_and_labels_across_a_border_are_not_learned():
    batch = packed(PACKED)
    batch.labels[0, 1] = -100
    batch.labels[0, 3] = 4  # the first token of the second text: nobody predicts it
    batch.labels[1, 0] = 6
    rows = flatten(batch, CONFIG)
    assert rows.targets.tolist() == [3, 5, 7, 8, 9]
    assert count_targets(batch) == 5


def test_positions_begin_anew_in_each_text():
    rows = flatten(packed(PACKED), CONFIG)
    angles = np.arctan2(rows.rotary[1], rows.rotary[0])[:, 0, 0]
    np.testing.assert_allclose(angles, [0, 1, 2, 0, 1, 0, 1, 2, 3], atol=1e-6)


def test_attention_sees_the_same_text_up_to_itself():
    rows = flatten(packed(PACKED), CONFIG)
    pad, unpad, inside, mask = rows.layout
    assert pad.shape == (3, 4)  # the longest text takes a row; 3 and 2 do not fit beside each other
    place = np.full(pad.size, -1)
    place[unpad] = range(9)
    assert inside.reshape(-1).tolist() == (place >= 0).astype(int).tolist()
    text = np.repeat([0, 1, 2], rows.lengths)
    visible = np.broadcast_to(mask, (3, 1, 4, 4))[:, 0] > MASKED / 2
    for row in range(3):
        for i in range(4):
            for j in range(4):
                query, key = place[4 * row + i], place[4 * row + j]
                if query >= 0:
                    allowed = key >= 0 and text[query] == text[key] and key <= query
                    assert visible[row, i, j] == allowed


def test_short_texts_share_a_row_of_places():
    rows = flatten(rows_of([[1] * 8, [2] * 3, [3] * 4, [4]]), CONFIG)
    pad, _, _, mask = rows.layout
    assert pad.shape == (2, 8) and mask.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids", 50, "token id 50 is outside"),
        ("ids", -1, "token id -1 is outside"),
        ("labels", 51, "label 51 is outside"),
    ],
)
def test_ids_outside_the_vocabulary(field, value, message):
    batch = packed(PACKED)
    getattr(batch, field)[0, 1] = value
    with pytest.raises(TrainingError, match=message):
        flatten(batch, CONFIG)


def test_what_is_behind_the_text_does_not_matter():
    batch = packed(PACKED, width=7, pad=1000)
    assert flatten(batch, CONFIG).ids.max() == 9


def test_misfit_arrays_and_a_batch_of_padding():
    batch = packed(PACKED)
    with pytest.raises(TrainingError, match="one shape"):
        flatten(dataclasses.replace(batch, labels=batch.labels[:, 1:]), CONFIG)
    with pytest.raises(TrainingError, match="without a token"):
        flatten(dataclasses.replace(batch, segments=np.full_like(batch.segments, -1)), CONFIG)
