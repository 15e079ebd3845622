"""Streaming text must be whole characters and add up to the whole decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.text.detokenizer import Detokenizer
from research.qwen.text.tokenizer import QwenTokenizer
from tests.text.golden_files import FIXTURES, golden


def _streamed(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join(detokenizer.add(i) for i in ids) + detokenizer.flush()


_any_id = st.integers(0, 151850)
_byte_id = st.integers(0, 255)  # the single bytes: mostly broken UTF-8


@pytest.mark.slow
@given(st.lists(_any_id | _byte_id | st.sampled_from([151643, 151645, 378, 235, 148738])))
@settings(deadline=None, max_examples=300)
def test_segments_add_up_to_the_whole_decoding(tokenizer: QwenTokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        whole = tokenizer.decode(ids, errors="replace", skip_special_tokens=skip)
        assert _streamed(Detokenizer(tokenizer, skip_special_tokens=skip), ids) == whole


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_segments_of_text_are_whole_characters(tokenizer: QwenTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for i in ids:
        shown += detokenizer.add(i)
        assert tokenizer.decode(ids).startswith(shown)
    assert shown == tokenizer.decode(ids)
    assert detokenizer.flush() == ""


def test_shows_what_the_published_stream_shows(tokenizer: QwenTokenizer) -> None:
    # The published stream drops broken bytes; ours marks them. Apart from the marks both show the same.
    for case in golden("stream_decode"):
        detokenizer = Detokenizer(tokenizer)
        shown = ""
        for token_id, text in zip(case["ids"], case["texts"], strict=True):
            shown += detokenizer.add(token_id)
            assert shown.replace("\ufffd", "") == text.replace("\ufffd", "")


def test_emoji_over_several_tokens(tokenizer: QwenTokenizer) -> None:
    ids = tokenizer.encode("🧑‍💻")
    assert len(ids) > 2
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) == "🧑‍💻"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_flush_marks_an_unfinished_character_and_starts_anew(tokenizer: QwenTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert tokenizer.token_bytes(378) == b"\xe2\x80"
    assert detokenizer.add(378) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.add(9707) == "Hello"
    assert detokenizer.flush() == ""


def test_words_of_an_additional_vocabulary_are_shown() -> None:
    # decode(skip_special_tokens=True) drops them, as the published code does; a reader must not lose them.
    extended = QwenTokenizer(extra_vocab_file=FIXTURES / "extra.tiktoken")
    ids = extended.encode("通义千问大模型<|im_end|>", allowed_special="all")
    assert extended.decode(ids, skip_special_tokens=True) == ""
    assert _streamed(Detokenizer(extended), ids) == "通义千问大模型"
