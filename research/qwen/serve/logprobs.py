"""Log-probabilities as the wire has them: OpenAI's chat form, the older form of completions, and vLLM's of prompts.

Tokens of a byte-level vocabulary need not be whole characters. The chat form has ``bytes`` for that; the older form
is keyed by text, where all such pieces would be the same U+FFFD: there they are written ``bytes:\\xe6\\xa0``, so
that every token of a position keeps a key of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from research.qwen.errors import PromptError
from research.qwen.messages import Delta, TokenLogprob
from research.qwen.text.detokenizer import Detokenizer
from research.qwen.text.tokenizer import QwenTokenizer

LEAST = -9999.0  # JSON has no infinity: what a banned token is reported with


class TokenNames:
    """Names and bytes of tokens; with ``as_ids`` every token is called ``token_id:7``."""

    def __init__(self, tokenizer: QwenTokenizer | None, as_ids: bool = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def bytes(self, token: int) -> bytes | None:
        """The bytes of a token; None for rows of the model that are no token, and without a vocabulary."""
        if self._tokenizer is None:
            return None
        try:
            return self._tokenizer.token_bytes(token)
        except PromptError:
            return None

    def text(self, token: int) -> str:
        """The token as text; incomplete characters as U+FFFD (its bytes say what it is)."""
        raw = None if self._as_ids else self.bytes(token)
        return f"token_id:{token}" if raw is None else raw.decode("utf-8", "replace")

    def key(self, token: int) -> str:
        """The token as a key that no other token has."""
        raw = None if self._as_ids else self.bytes(token)
        if raw is None:
            return f"token_id:{token}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_entry(entry: TokenLogprob, names: TokenNames, k: int) -> dict[str, Any]:
    """One element of ``logprobs.content``, with the ``k`` best tokens."""
    top = [_chat_token(token, value, names) for token, value in entry.top[:k]]
    return {**_chat_token(entry.id, entry.logprob, names), "top_logprobs": top}


def _chat_token(token: int, value: float, names: TokenNames) -> dict[str, Any]:
    raw = names.bytes(token)
    return {
        "token": names.text(token),
        "logprob": max(value, LEAST),
        "bytes": list(raw) if raw is not None else None,
    }


def prompt_entries(
    ids: Sequence[int], entries: Iterable[TokenLogprob | None], names: TokenNames, k: int
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token {id: {logprob, rank, decoded_token}}; None for the first.

    ``rank`` counts from 1 and is None for a prompt token that is not among the best.
    """
    listed: list[dict[str, Any] | None] = []
    for token, entry in zip(ids, entries, strict=True):
        if entry is None:
            listed.append(None)
            continue
        ranked: list[tuple[int, float, int | None]] = [
            (best, value, place) for place, (best, value) in enumerate(entry.top[:k], 1)
        ]
        if token not in [best for best, _, _ in ranked]:
            ranked.insert(0, (token, entry.logprob, None))
        listed.append(
            {
                str(best): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": names.text(best)}
                for best, value, rank in ranked
            }
        )
    return listed


class LegacyLogprobs:
    """The object {tokens, token_logprobs, top_logprobs, text_offset} of /v1/completions, grown piece by piece.

    Every token has an entry, the end token too, so the arrays are as long as the token counts say. ``text_offset``
    is the place of a token's first character in the text of the choice. A token's own value and its value among the
    best are the same float.
    """

    def __init__(self, names: TokenNames, tokenizer: QwenTokenizer | None, k: int):
        """``k``: how many of the best tokens are listed."""
        self._names, self._k = names, k
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=False) if tokenizer is not None else None
        )
        self._place = 0

    def prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """The part of an echoed prompt; the first token has neither value nor rivals."""
        part = self._part([(token, entry) for token, entry in zip(ids, entries, strict=True)])
        if self._detokenizer is not None:
            self._place += len(self._detokenizer.flush())
        return part

    def answer(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The part of some generated tokens."""
        return self._part([(entry.id, entry) for entry in entries])

    def _part(self, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        part: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in tokens:
            part["tokens"].append(self._names.key(token))
            part["token_logprobs"].append(max(entry.logprob, LEAST) if entry else None)
            part["top_logprobs"].append(self._top(entry) if entry else None)
            part["text_offset"].append(self._place)
            self._place += len(self._text(token))
        return part

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        best = {self._names.key(token): max(value, LEAST) for token, value in entry.top[: self._k]}
        best.setdefault(self._names.key(entry.id), max(entry.logprob, LEAST))
        return best

    def _text(self, token: int) -> str:
        if self._detokenizer is None or self._names.bytes(token) is None:
            return ""
        return self._detokenizer.add(token)


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Parts of ``LegacyLogprobs`` as one object."""
    whole: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name, values in part.items():
            whole[name] += values
    return whole


class ShownTokens:
    """Which tokens the text shown so far is made of: the entries of ``logprobs.content`` beside a stream of text.

    A token is shown with its first character. The end token and those of a stop string are no part of the content
    and never come; of an answer cut at its length limit all do.
    """

    def __init__(self, tokenizer: QwenTokenizer | None, skip_special_tokens: bool = True):
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens) if tokenizer is not None else None
        self._waiting: list[tuple[int, TokenLogprob]] = []  # place of the first character, entry
        self._decoded = self._shown = 0

    def add(self, delta: Delta) -> list[TokenLogprob]:
        """Take a delta; the entries of the tokens that its text shows."""
        for entry in delta.logprobs:
            self._waiting.append((self._decoded, entry))
            self._decoded += len(self._text(entry.id))
        self._shown += len(delta.text)
        if delta.finish_reason == "length":
            count = len(self._waiting)
        else:
            count = sum(place < self._shown for place, _ in self._waiting)
        ready = [entry for _, entry in self._waiting[:count]]
        del self._waiting[:count]
        return ready

    def _text(self, token: int) -> str:
        if self._detokenizer is None:
            return ""
        try:
            return self._detokenizer.add(token)
        except PromptError:
            return ""
