"""Answers held to a grammar: any JSON object, a JSON schema, a pattern, a list of texts, or a grammar of one's own.

A grammar is compiled once per vocabulary and cached; each choice of a request has a state of its own, a logits
processor that bans every token which cannot go on. Tokens are bytes, so a character split over several of them is
no special case. A control token never comes inside; after a finished grammar nothing but an end id does. What is
allowed depends on the ids of the answer alone: seeds, batch mates and preemption change nothing.

The grammars are run by llguidance, an optional package that is imported when the first one is compiled. An answer
that reaches ``max_new_tokens`` is cut off in the middle of its grammar; ``ignore_eos`` makes no sense with one.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.processors import LogitsProcessor, Row
from research.qwen.decode.schemas import blame, check_pattern, schema_text
from research.qwen.errors import RequestError

MAX_CHOICES = 1_000
MAX_GRAMMAR = 1_000_000  # characters, the schemas in it included
# White space between the parts of JSON: a blank, or a new line with its indent. A model that knows little JSON would
# go on with more of it until its tokens are used up.
_JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,32}"}
_LENIENT: Mapping[str, Any] = {"lenient": True, "coerce_one_of": True}
# Bounds on the work of one mask; a request whose grammar needs more fails, and it alone.
_LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
_INLINE_JSON = re.compile(r"%json\s*")


class Tokenizer(Protocol):
    """What constraints need of a vocabulary (``text.tokenizer.QwenTokenizer`` is one)."""

    vocab_size: int
    special_tokens: dict[str, int]

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""


@dataclass(frozen=True)
class Constraint:
    """A compiled grammar; call it with the number of a choice for the processors of that choice.

    ``warnings`` names what of a schema is not enforced (only without ``strict``).
    """

    vocabulary: _Vocabulary
    template: Any  # a matcher in its first state, never advanced
    warnings: tuple[str, ...] = ()

    def __call__(self, choice: int = 0) -> tuple[LogitsProcessor, ...]:
        """A fresh state at the start of the grammar; the first row it sees is that of the first new token."""
        return (_Guide(self.template.deep_copy(), self.vocabulary),)


class ConstraintCompiler:
    """Compiles grammars for one vocabulary; thread-safe. Compiling takes about a millisecond, the first 0.5 s more.

    Args:
        vocab_size: columns of the logits; the ids past the tokenizer's own never come.
        end_ids: what may follow a finished grammar.
        cached: compiled grammars kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int], *, cached: int = 128
    ) -> None:
        ends = tuple(token for token in dict.fromkeys(end_ids) if 0 <= token < vocab_size)
        if not ends:
            raise RequestError(
                "constrained decoding needs an end id within the vocabulary; this model has none"
            )
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, ends)
        self._lock = threading.Lock()
        self._cached = cached
        self._known: OrderedDict[str, Constraint] = OrderedDict()

    def warm(self) -> None:
        """Read the vocabulary now instead of with the first grammar. Raises RequestError without llguidance."""
        self.json_object()

    def json_object(self) -> Constraint:
        """Any JSON object, alone."""
        return self.json_schema({"type": "object"})

    def json_schema(
        self, schema: Mapping[str, Any] | bool, *, strict: bool = True, place: str = "schema"
    ) -> Constraint:
        """A JSON value that fulfils the schema, its properties in the order of the schema.

        Without ``strict``, keywords that cannot be enforced are left out (see ``Constraint.warnings``).

        Raises:
            RequestError: the schema is invalid, cannot be enforced, or exceeds the limits of ``decode.schemas``;
                names the place below ``place``.
        """
        text = schema_text(schema, place)
        root = dict(schema) if isinstance(schema, Mapping) else {}
        options = {**_JSON_OPTIONS, **({} if strict else _LENIENT)}

        def failure(part: Mapping[str, Any]) -> str:
            return self._failure(_json_grammar(part, options))

        try:
            return self._compile(_json_grammar(json.loads(text) if root else {}, options), place)
        except RequestError as error:
            words = failure(root)
            where = blame(root, place, failure) if words else place
            if not words:
                raise
            raise RequestError(f"{where}: {words}") from error

    def regex(self, pattern: str, *, place: str = "regex") -> Constraint:
        """A text that the whole pattern matches (Rust's syntax: no look-around, no back references)."""
        check_pattern(pattern, place)
        return self._compile(_llguidance().LLMatcher.grammar_from_regex(pattern), place)

    def choice(self, texts: Sequence[str], *, place: str = "choice") -> Constraint:
        """One of the texts."""
        if isinstance(texts, str) or not texts or len(texts) > MAX_CHOICES:
            raise RequestError(f"{place} must hold 1 to {MAX_CHOICES} texts")
        for text in texts:
            if not isinstance(text, str) or not text or not _encodable(text):
                raise RequestError(f"{place} must hold non-empty texts, got {text!r:.80}")
            check_pattern(_literal(text), place)
        return self.regex("|".join(map(_literal, texts)), place=place)

    def lark(self, grammar: str, *, place: str = "grammar") -> Constraint:
        """A grammar in llguidance's dialect of Lark; ``%json`` schemas in it are checked as by ``json_schema``.

        The grammar itself must come from a program, not from a stranger: it may be costly without limit.
        """
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(f"{place} has {len(grammar)} characters; at most {MAX_GRAMMAR} are taken")
        return self._compile(
            json.dumps({"grammars": [{"lark_grammar": self._inline(grammar, place)}]}), place
        )

    def _inline(self, grammar: str, place: str) -> str:
        """The grammar with its JSON schemas checked, each with a bound on white space: the grammar's own, or ours."""
        pieces, end, number = [], 0, 0
        while (found := _INLINE_JSON.search(grammar, end)) is not None:
            pieces.append(grammar[end : found.end()])
            try:
                schema, end = json.JSONDecoder().raw_decode(grammar, found.end())
            except (ValueError, RecursionError):
                end = found.end()
                continue
            where = f"{place}: schema {number}"
            number += 1
            self.json_schema(schema, place=where)
            if isinstance(schema, dict):
                schema = {"x-guidance": dict(_JSON_OPTIONS), **schema}
            pieces.append(json.dumps(schema))
        return "".join(pieces) + grammar[end:]

    def _compile(self, grammar: str, place: str) -> Constraint:
        with self._lock:
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
                return known
            matcher = self._vocabulary.matcher(grammar)
            words = matcher.get_error()
            if not words:
                words = _first_mask_error(matcher, self._vocabulary)
            if words:
                raise RequestError(f"{place}: {_one_line(words)}")
            made = Constraint(self._vocabulary, matcher, tuple(matcher.get_grammar_warnings()))
            self._known[grammar] = made
            while len(self._known) > self._cached:
                self._known.popitem(last=False)
            return made

    def _failure(self, grammar: str) -> str:
        """What is wrong with a grammar, in one line; "" if nothing."""
        with self._lock:
            return _one_line(str(self._vocabulary.matcher(grammar).get_error()))


class _Vocabulary:
    """The tokens as llguidance wants them; read when the first grammar is compiled."""

    def __init__(self, tokenizer: Tokenizer, size: int, end_ids: tuple[int, ...]) -> None:
        self.size, self.end_ids = size, end_ids
        self._tokenizer = tokenizer

    @cached_property
    def usable(self) -> NDArray[np.int32]:
        """(words,) bits of the ids that may ever come: text and end ids."""
        bits = np.zeros(-(-self._rows // 32) * 32, np.uint8)
        bits[: self._tokenizer.vocab_size] = 1
        bits[list(self._tokenizer.special_tokens.values())] = 0
        bits[list(self.end_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The end ids as indices."""
        return np.array(self.end_ids, np.int64)

    def matcher(self, grammar: str) -> Any:
        """A matcher at the start of the grammar; its get_error says what is wrong, "" if nothing."""
        package = _llguidance()
        limits = package.LLParserLimits(**_LIMITS, verbose_errors=False)
        return package.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)

    @property
    def _rows(self) -> int:
        return max(self.size, self._tokenizer.vocab_size)

    @cached_property
    def _tokens(self) -> Any:
        package = _llguidance()
        return package.LLTokenizer(
            package.TokenizerWrapper(_Bytes(self._tokenizer, self._rows, self.end_ids[0])),
            n_vocab=self._rows,
            eos_token=list(self.end_ids),
            slices=package.LLTokenizer.json_slices(),
        )


class _Bytes:
    """A vocabulary under the names that llguidance's TokenizerWrapper reads."""

    def __init__(self, tokenizer: Tokenizer, rows: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_id, None
        count = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(token) for token in range(count)] + [b""] * (rows - count)
        self.special_token_ids = [*tokenizer.special_tokens.values()]
        self._single = {text[0]: token for token, text in enumerate(self.tokens) if len(text) == 1}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that is certain to come; as bytes where the tokenizer would change it (NFC)."""
        if not isinstance(text, str):
            raise TypeError("text is wanted")  # the wrapper tries which of the two is taken
        ids = self._tokenizer.encode(text)
        data = text.encode()
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        return [self._single[byte] for byte in data]


class _Guide:
    """The processor of one choice: follows its answer through the grammar and bans what cannot go on."""

    def __init__(self, matcher: Any, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._mask = np.zeros_like(vocabulary.usable)
        self._seen: int | None = None  # ids of the sequence already followed
        self._finished = False

    def __call__(self, ids: Sequence[int], scores: Row) -> Row:
        """Ban all but what may follow ``ids``, the prompt and what was generated since the first call."""
        if self._seen is None:
            self._seen = len(ids)
        for token in ids[self._seen :]:
            self._follow(token)
        self._seen = len(ids)
        if self._finished:
            kept = scores[self._vocabulary.ends]
            scores[:] = -np.inf
            scores[self._vocabulary.ends] = kept
            return scores
        words = _fill(self._matcher, self._mask)
        if words:
            raise _too_complex(words)
        self._mask &= self._vocabulary.usable
        allowed = np.unpackbits(self._mask.view(np.uint8), count=len(scores), bitorder="little")
        np.copyto(scores, -np.inf, where=allowed == 0)
        return scores

    def _follow(self, token: int) -> None:
        if self._finished:
            return
        if not self._matcher.consume_token(token):
            if self._mask[token // 32] >> (token % 32) & 1:
                raise _too_complex(self._matcher.get_error())
            raise RequestError(f"token {token} was not drawn from what the grammar of the answer allows")
        self._finished = self._matcher.is_stopped()


def _fill(matcher: Any, mask: NDArray[np.int32]) -> str:
    """Write the bits of the tokens that may come next; the error if there is one, else ""."""
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return str(matcher.get_error())


def _too_complex(words: str) -> RequestError:
    return RequestError(f"the grammar of the answer is too complex to go on with: {_one_line(words)}")


def _first_mask_error(matcher: Any, vocabulary: _Vocabulary) -> str:
    return _fill(matcher.deep_copy(), np.empty_like(vocabulary.usable))


def _json_grammar(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": dict(options)}}]})


def _literal(text: str) -> str:
    """A pattern that matches exactly this text."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _one_line(words: str) -> str:
    """The first line that says something, without the dump of the parser's state."""
    if words.startswith("NoExtension"):
        return "nothing can fulfil it"
    lines = [line.strip() for line in words.split("<state>")[0].replace("<non-verbose/>", "").splitlines()]
    return " ".join(line for line in lines if line)[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "answers held to a schema or grammar need the package llguidance: pip install 'qwen-mindspore[serve]'"
        ) from error
    return llguidance
