"""A Hugging Face fast tokenizer (class Qwen2Tokenizer) from the published vocabulary, with the same ids.

The published file holds byte strings and their ranks. Hugging Face wants merges instead: a token of rank r is
the merge of the two pieces that byte-pair encoding with the ranks below r leaves of it.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from research.qwen.chat_template import CHAT_TEMPLATE, SPLIT_PATTERN
from research.qwen.errors import VocabularyError
from research.qwen.weights.companions import json_text

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def read_ranks(path: Path) -> list[bytes]:
    """Byte strings of a .tiktoken file in the order of their ranks 0, 1, 2, ...; VocabularyError if it is
    damaged."""
    ranks: dict[int, bytes] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                ranks[int(rank)] = base64.b64decode(token, validate=True)
    except (OSError, ValueError, binascii.Error) as error:
        raise VocabularyError(f"{path} is damaged: {error}; download it again") from None
    tokens = [ranks[i] for i in sorted(ranks)]
    if sorted(ranks) != list(range(len(ranks))) or len(set(tokens)) != len(tokens) or len(tokens) < 256:
        raise VocabularyError(
            f"{path} is damaged: its ranks are not 0, 1, 2, ... once each; download it again"
        )
    return tokens


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte is merged from, in the order of ranks.

    Raises VocabularyError if a token cannot be reached by merging two lower ones.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            pieces = _encode(token, ranks, rank)
            if len(pieces) != 2:
                raise VocabularyError(f"token {rank} ({token!r}) is not a merge of two lower tokens")
            pairs.append((pieces[0], pieces[1]))
    return pairs


def tokenizer_files(tokens: list[bytes], chat: bool, max_length: int) -> dict[str, str]:
    """File name -> text of the four files Hugging Face tokenizers are read from, for ``tokens`` by rank."""
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {spell(token): rank for rank, token in enumerate(tokens)}
    pairs = [f"{spell(left)} {spell(right)}" for left, right in merges(tokens)]
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    added = [{"id": len(tokens) + i, "content": name, **flags} for i, name in enumerate(CONTROL)]
    return {
        "tokenizer.json": json_text(_fast(vocab, pairs, added)),
        "tokenizer_config.json": json_text(_config(added, chat, max_length)),
        "vocab.json": json_text(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]),
    }


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _fast(vocab: dict[str, int], pairs: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer.json: normalise to NFC, split, then byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": pairs,
        },
    }


def _config(added: list[dict[str, Any]], chat: bool, max_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if chat else "<|endoftext|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    return config | ({"chat_template": CHAT_TEMPLATE} if chat else {})


def _encode(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Byte-pair encoding of ``token`` with ranks below ``limit`` only."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 1:
        best, at = limit, -1
        for i in range(len(pieces) - 1):
            rank = ranks.get(pieces[i] + pieces[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
