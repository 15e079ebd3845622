"""The tokenizer against the published one (golden), and what golden does not cover."""

from __future__ import annotations

import base64
import copy
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import PromptError
from research.qwen.text.tokenizer import QwenTokenizer
from tests.text.golden_files import FIXTURES, golden, golden_vocab

ENCODE = golden("encode")


def _special(value: str | list[str]) -> str | set[str]:
    return value if isinstance(value, str) else set(value)


def test_golden_encode_is_complete() -> None:
    assert len(ENCODE) == 565


@pytest.mark.parametrize("category", sorted({case["category"] for case in ENCODE}))
def test_encode_and_decode_equal_published(tokenizer: QwenTokenizer, category: str) -> None:
    for case in (case for case in ENCODE if case["category"] == category):
        ids = tokenizer.encode(case["text"], allowed_special=_special(case["allowed_special"]))
        assert ids == case["ids"], case["n"]
        assert tokenizer.decode(ids) == case["decoded"], case["n"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"], case["n"]


@pytest.mark.parametrize("case", golden("encode_disallowed"), ids=lambda case: repr(case["text"]))
def test_disallowed_special(tokenizer: QwenTokenizer, case: dict[str, Any]) -> None:
    allowed, disallowed = _special(case["allowed_special"]), _special(case["disallowed_special"])
    if case["error"]:
        with pytest.raises(PromptError, match=r"'<\|.*\|>' at character \d+"):
            tokenizer.encode(case["text"], allowed, disallowed)
    else:
        assert tokenizer.encode(case["text"], allowed, disallowed) == case["ids"]


def test_decode_equals_published(tokenizer: QwenTokenizer) -> None:
    for case in golden("decode"):
        arguments = {"errors": case["errors"], "skip_special_tokens": case["skip_special_tokens"]}
        if case["error"]:
            with pytest.raises(PromptError, match=f"token id {case['ids'][-1]} is not in the vocabulary"):
                tokenizer.decode(case["ids"], **arguments)
        else:
            assert tokenizer.decode(case["ids"], **arguments) == case["text"]


def test_stream_decode_equals_published(tokenizer: QwenTokenizer) -> None:
    for case in golden("stream_decode"):
        for end, text in enumerate(case["texts"], start=1):
            assert tokenizer.decode(case["ids"][:end], errors="ignore", skip_special_tokens=True) == text


def test_vocabulary_equals_published(tokenizer: QwenTokenizer) -> None:
    vocab = golden_vocab()
    assert (len(tokenizer), tokenizer.vocab_size) == (vocab["len"], vocab["vocab_size"])
    assert tokenizer.special_tokens == vocab["special_tokens"]
    assert tokenizer.eod_id == vocab["eod_id"] == vocab["n_regular"]
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (vocab["im_start_id"], vocab["im_end_id"])
    single_bytes = vocab["single_byte_ids"]
    assert len(single_bytes) == 256
    for byte, token_id in single_bytes.items() if isinstance(single_bytes, dict) else enumerate(single_bytes):
        assert tokenizer.token_bytes(token_id) == bytes((int(byte),))
    for token_id, data in vocab["sample_tokens_base64"].items():
        assert tokenizer.token_bytes(int(token_id)) == base64.b64decode(data)


def test_additional_vocabulary_equals_published() -> None:
    extended = QwenTokenizer(extra_vocab_file=FIXTURES / "extra.tiktoken")
    size, *cases = golden("extra_vocab")
    assert len(extended) == size["len"]
    for case in cases:
        ids = extended.encode(case["text"], allowed_special="all")
        assert ids == case["ids"]
        assert extended.decode(ids) == case["decoded"]
        assert extended.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_round_trip_is_nfc(tokenizer: QwenTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(i < tokenizer.eod_id for i in ids)


@given(
    st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_204|>", "<|", "|>", "x"])
    )
)
@settings(deadline=None)
def test_plain_text_never_yields_control_ids(tokenizer: QwenTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert all(i < tokenizer.eod_id for i in ids)
    assert tokenizer.decode(ids) == text


def test_special_arguments(tokenizer: QwenTokenizer) -> None:
    text = "a<|im_end|>b"
    for allowed in ("all", "<|im_end|>", ["<|im_end|>"], ("<|im_end|>",), {"<|im_end|>": 1}):
        assert tokenizer.encode(text, allowed_special=allowed) == [64, tokenizer.im_end_id, 65]
    with pytest.raises(PromptError, match="unknown control token '<|im_edn|>'".replace("|", r"\|")):
        tokenizer.encode(text, allowed_special={"<|im_edn|>"})
    with pytest.raises(PromptError, match="'a<'"):
        tokenizer.encode(text, disallowed_special=["zzz", "a<"])
    assert tokenizer.control_id("<|extra_204|>") == 151850
    with pytest.raises(PromptError, match="nope"):
        tokenizer.control_id("nope")


@pytest.mark.parametrize("bad", [-1, 151851, 2**31, 2**40])
def test_id_outside_the_vocabulary(tokenizer: QwenTokenizer, bad: int) -> None:
    for call in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(PromptError, match=f"token id {bad} "):
            call([9707, bad])
    with pytest.raises(PromptError, match=f"token id {bad} "):
        tokenizer.token_bytes(bad)


def test_decode_takes_any_iterable_of_integers(tokenizer: QwenTokenizer) -> None:
    numpy = pytest.importorskip("numpy")
    ids = tokenizer.encode("你好，世界！")
    assert tokenizer.decode(iter(ids)) == tokenizer.decode(numpy.array(ids)) == "你好，世界！"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000"])
@pytest.mark.parametrize("before", ["", "x", "!", "\n"])
@pytest.mark.parametrize("after", ["", "x", "!", "1", "\nx", "<|im_end|>"])
def test_long_blanks_are_cut_as_the_pattern_does(
    tokenizer: QwenTokenizer, blank: str, before: str, after: str
) -> None:
    # 12,000 blanks are still within the regex engine's stack: both ways must agree.
    text = before + blank * 12_000 + after
    for allowed in (frozenset[str](), frozenset({"<|im_end|>"})):
        assert tokenizer._encode_long_blanks(text, allowed) == tokenizer._encode(text, allowed)


@pytest.mark.slow
def test_a_million_blanks(tokenizer: QwenTokenizer) -> None:
    text = "a" + " " * 1_200_000 + "b"
    with pytest.raises(ValueError, match="stack"):
        tokenizer._encode(text, frozenset())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.encode(" b")[0]


@pytest.mark.parametrize("character", ["a", "的", "!", "1", "\n", "e\u0301"])
def test_long_runs_without_blanks(tokenizer: QwenTokenizer, character: str) -> None:
    text = character * 200_000
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_ascii_separators_are_not_white_space(tokenizer: QwenTokenizer) -> None:
    # Were U+001F white space, the two blanks before it would be one token.
    assert len(tokenizer.encode("  \n")) == 1
    assert tokenizer.encode("  \x1f") == tokenizer.encode(" ") + tokenizer.encode(" \x1f")
    assert tokenizer.encode("  \x1f")[0] != tokenizer.encode("  ")[0]


def test_copies(tokenizer: QwenTokenizer, small_vocab: Path) -> None:
    extended = QwenTokenizer(extra_vocab_file=FIXTURES / "extra.tiktoken", errors="ignore")
    for original in (tokenizer, extended, QwenTokenizer(small_vocab)):
        for twin in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original), copy.copy(original)):
            assert len(twin) == len(original)
            assert twin.vocab_file == original.vocab_file
            assert twin.errors == original.errors
            assert twin.encode("hello 通义千问") == original.encode("hello 通义千问")


def test_small_vocabulary(small_vocab: Path) -> None:
    tokenizer = QwenTokenizer(small_vocab)
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (260, 261, 262)
    assert tokenizer.control_id("<|extra_0|>") == 263
    assert len(tokenizer) == tokenizer.vocab_size == 260 + 208
    ids = tokenizer.encode("hello 你<|im_end|>", allowed_special="all")
    assert ids == [259, 0x20, *"你".encode(), 262]
    assert tokenizer.decode(ids) == "hello 你<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 你"


def test_changed_file_is_read_anew(tmp_path: Path, small_vocab: Path) -> None:
    path = tmp_path / "v.tiktoken"
    path.write_bytes(small_vocab.read_bytes())
    assert len(QwenTokenizer(path)) == 468
    path.write_bytes(small_vocab.read_bytes() + base64.b64encode(b"hello!") + b" 260\n")
    assert len(QwenTokenizer(path)) == 469


def test_errors_argument(small_vocab: Path) -> None:
    broken = [0x41, 0xE4, 0xBD]
    assert QwenTokenizer(small_vocab).decode(broken) == "A\ufffd"
    assert QwenTokenizer(small_vocab, errors="ignore").decode(broken) == "A"
    assert QwenTokenizer(small_vocab, errors="ignore").decode(broken, errors="replace") == "A\ufffd"
    with pytest.raises(UnicodeDecodeError):
        QwenTokenizer(small_vocab).decode(broken, errors="strict")
