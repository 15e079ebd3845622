"""The shortcuts for long texts must give the normal form of the whole text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.text.nfc import to_nfc

# Marks, jamo, Bengali vowel signs that might combine, chunks without a boundary, a lone surrogate.
_MARKS = ["e", "\u0301", "\u0327", "\u1100", "\u1161", "한", "\u2001", "\ud83d"]
_PARTS = [*_MARKS, "বাংলা ভাষা ", "的" * 300, "x" * 300, " "]


@given(st.lists(st.sampled_from(_PARTS)), st.sampled_from([1, 4, 400]))
@settings(deadline=None, max_examples=60)
def test_equals_the_normal_form_of_the_whole(parts: list[str], repeats: int) -> None:
    text = "".join(parts) * repeats
    assert to_nfc(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("late", ["e\u0301", " \u0301\u0327", "\u2001", "\u212b", "\u1100\u1161"])
def test_a_late_change_after_many_words_that_need_none(late: str) -> None:
    text = "বাংলা ভাষা " * 2000
    assert to_nfc(text) is text
    assert to_nfc(text + late + text) == text + unicodedata.normalize("NFC", late) + text


def test_text_in_nfc_comes_back_as_it_is() -> None:
    for text in ("", "a", "é", "x" * 5000, "的" * 5000, "é " * 5000):
        assert to_nfc(text) is text
