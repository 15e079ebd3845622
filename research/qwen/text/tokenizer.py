"""The published byte-level BPE tokenizer on tiktoken: same ids, control ids only on request."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import tiktoken

from research.qwen.chat_template import SPLIT_PATTERN
from research.qwen.errors import PromptError, VocabularyError
from research.qwen.text.nfc import to_nfc
from research.qwen.text.vocabulary import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    IM_END,
    IM_START,
    StrPath,
    find_vocab_file,
    load_extra_ranks,
    load_ranks,
)

__all__ = ["QwenTokenizer", "find_vocab_file"]

SpecialNames = Literal["all"] | Collection[str]

# How text is cut into the pieces that BPE works on (the published pattern; one digit is one piece).
# Unicode White_Space without \r and \n. Python's own \s also holds U+001C-U+001F, the pattern's does not.
_BLANK = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_BLANK = re.compile(rf"[{_BLANK}]{{10000,}}+(?![\r\n])")


class _Vocabulary:
    """Ranks and the two tiktoken encodings made from them; shared by all tokenizers of one file."""

    def __init__(self, path: Path, extra_path: Path | None) -> None:
        self.ranks = load_ranks(path)
        first = len(self.ranks)
        self.special_tokens = {name: first + i for i, name in enumerate(CONTROL_TOKENS)}
        if extra_path is not None:
            self.ranks.update(load_extra_ranks(extra_path, self.ranks, first + len(CONTROL_TOKENS)))
        self.encoding = tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def one_piece(self) -> tiktoken.Encoding:
        """Takes any text as a single BPE piece."""
        return tiktoken.Encoding(
            "qwen-piece", pat_str=r"(?s:.+)", mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )


@lru_cache(maxsize=4)
def _load(path: Path, stamp: int, extra_path: Path | None, extra_stamp: int) -> _Vocabulary:
    # The modification times are only part of the cache key.
    return _Vocabulary(path, extra_path)


@lru_cache(maxsize=64)
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise VocabularyError(f"cannot read the vocabulary {path}: {error.strerror}") from error


class QwenTokenizer:
    """Text to token ids and back, identical to the published tokenizer.

    ``special_tokens`` maps the 208 control tokens to ids; they follow the highest rank of the vocabulary
    file, which need not be the published one. Pickles as the path of its file.
    """

    def __init__(
        self,
        vocab_file: StrPath | None = None,
        *,
        extra_vocab_file: StrPath | None = None,
        errors: str = "replace",
    ) -> None:
        """Load the vocabulary (see ``find_vocab_file``); ``errors`` is the default of ``decode``.

        Raises:
            VocabularyError: a vocabulary file is missing or corrupt.
        """
        self.vocab_file: Path = find_vocab_file(vocab_file)
        self.extra_vocab_file: Path | None = Path(extra_vocab_file).absolute() if extra_vocab_file else None
        self.errors = errors
        extra_stamp = _stamp(self.extra_vocab_file) if self.extra_vocab_file else 0
        self._vocabulary = _load(self.vocab_file, _stamp(self.vocab_file), self.extra_vocab_file, extra_stamp)
        self._encoding = self._vocabulary.encoding
        self.special_tokens: dict[str, int] = dict(self._vocabulary.special_tokens)
        self.eod_id: int = self.special_tokens[END_OF_TEXT]
        self.im_start_id: int = self.special_tokens[IM_START]
        self.im_end_id: int = self.special_tokens[IM_END]
        self.vocab_size: int = self._encoding.n_vocab
        self._control_names = frozenset(self.special_tokens)

    def __len__(self) -> int:
        """Number of ids, control tokens and additional vocabulary included."""
        return self.vocab_size

    def __repr__(self) -> str:
        return f"QwenTokenizer({os.fspath(self.vocab_file)!r}, vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self.vocab_file, self.extra_vocab_file, self.errors)

    def encode(
        self,
        text: str,
        allowed_special: SpecialNames = frozenset(),
        disallowed_special: SpecialNames = frozenset(),
    ) -> list[int]:
        """Return the token ids of ``text``, normalised to NFC; lone surrogates become U+FFFD.

        Args:
            text: Any text; the names of control tokens in it are ordinary text.
            allowed_special: Control tokens that become their ids where their name occurs, or "all".
            disallowed_special: Strings that may not occur, or "all" for every control token not allowed.

        Raises:
            PromptError: a disallowed string occurs, or an unknown control token is allowed.
        """
        text = to_nfc(text)
        allowed = self._allowed(allowed_special) if allowed_special else frozenset()
        if disallowed_special:
            self._refuse(text, disallowed_special, allowed)
        try:
            return self._encode(text, allowed)
        except ValueError:
            # The regex engine runs out of stack at about a million blanks in a row.
            if not _LONG_BLANK.search(text):
                raise
            return self._encode_long_blanks(text, allowed)

    def decode(
        self,
        ids: Iterable[int],
        errors: str | None = None,
        skip_special_tokens: bool = False,
    ) -> str:
        """Return the text of ``ids``; ``errors`` (replace, ignore, strict) says what becomes of broken UTF-8.

        ``skip_special_tokens`` drops every id from ``<|endoftext|>`` on; as published, this includes the ids
        of an additional vocabulary.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        ids = ids if isinstance(ids, list) else list(ids)
        if skip_special_tokens and max(ids, default=0) >= self.eod_id:
            ids = [i for i in ids if i < self.eod_id]
        return self.decode_bytes(ids).decode("utf-8", self.errors if errors is None else errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ``ids`` joined, control tokens as their names.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        ids = ids if isinstance(ids, list) else list(ids)
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError, TypeError):
            for i in ids:
                self.token_bytes(i)
            raise

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; they need not be whole characters.

        Raises:
            PromptError: the id is outside the vocabulary.
        """
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError, TypeError) as error:
            raise PromptError(
                f"token id {token_id!r} is not in the vocabulary of {self.vocab_size} tokens "
                f"({self.vocab_file.name})"
            ) from error

    def control_id(self, name: str) -> int:
        """Return the id of a control token such as ``<|im_end|>``.

        Raises:
            PromptError: there is no such control token.
        """
        try:
            return self.special_tokens[name]
        except KeyError:
            raise PromptError(
                f"unknown control token {name!r}; there are {END_OF_TEXT}, {IM_START}, {IM_END}, "
                f"<|extra_0|> to {CONTROL_TOKENS[-1]}"
            ) from None

    def _allowed(self, names: SpecialNames) -> frozenset[str]:
        if isinstance(names, str):
            if names == "all":
                return self._control_names
            names = (names,)
        allowed = frozenset(names)
        for name in sorted(allowed - self._control_names):
            self.control_id(name)
        return allowed

    def _refuse(self, text: str, names: SpecialNames, allowed: frozenset[str]) -> None:
        if isinstance(names, str):
            refused = self._control_names - allowed if names == "all" else frozenset((names,))
        else:
            refused = frozenset(names)
        found = _any_of(refused).search(text) if refused else None
        if found:
            raise PromptError(
                f"the text holds {found.group()!r} at character {found.start()}, which is not allowed here; "
                f"remove it, or leave it out of disallowed_special to encode it as plain text"
            )

    def _encode(self, text: str, allowed: frozenset[str]) -> list[int]:
        # Not encode_ordinary: where the regex engine gives up, that aborts instead of raising.
        return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def _encode_long_blanks(self, text: str, allowed: frozenset[str]) -> list[int]:
        """Cut the long runs of blanks out by hand, exactly where the pattern would.

        A run that no newline follows is one piece; before more text (a control token starts anew) it leaves
        its last blank to the next piece.
        """
        ids: list[int] = []
        start = 0
        for run in _LONG_BLANK.finditer(text):
            end = run.end()
            if end < len(text) and not text.startswith(tuple(allowed), end):
                end -= 1
            ids += self._encode(text[start : run.start()], allowed)
            ids += self._vocabulary.one_piece.encode(text[run.start() : end], disallowed_special=())
            start = end
        return ids + self._encode(text[start:], allowed)


def _restore(vocab_file: Path, extra_vocab_file: Path | None, errors: str) -> QwenTokenizer:
    return QwenTokenizer(vocab_file, extra_vocab_file=extra_vocab_file, errors=errors)
