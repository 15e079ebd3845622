"""What a request may ask of decoding: one frozen value, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from research.qwen.config import suggest
from research.qwen.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100.0

_DECIMAL = re.compile("[0-9]{1,18}")  # Python refuses to convert thousands of digits


@dataclass(frozen=True)
class SamplingParams:
    """Sampling, penalties, length and stops of one request; RequestError names a bad field and its value.

    ``temperature`` 0 or ``top_k`` 1 is greedy decoding. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and penalties
    1, 0, 0 are off. ``seed`` None draws a fresh one. ``max_new_tokens`` None runs to the end of the context, 0 only
    reads the prompt. ``stop`` holds texts (a bare string is taken as one), ``stop_token_ids`` ids; ``ignore_eos``
    switches off the model's own end ids only; no end id and no stop text ends an answer of fewer than
    ``min_new_tokens``. ``logprobs`` None reports nothing, 0 the chosen token, k also the k best ones;
    ``prompt_logprobs`` the same for the prompt.

    ``logit_bias`` (token id to a value of -100 to 100; the keys may be decimal strings, as JSON has them) is added
    to the logits. ``allowed_token_ids`` bans all others; an answer never holds a sequence of ``bad_words_ids``.
    ``include_stop_str_in_output`` leaves the stop text in the answer, ``skip_special_tokens`` False shows control
    tokens as text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int | None = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # a copy, not to be changed
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._real("temperature", 0.0, math.inf)
        self._integer("top_k", 0, None, hint="; 0 switches it off")
        self._real("top_p", 0.0, 1.0, open_low=True, hint="; 1 switches it off")
        self._real("min_p", 0.0, 1.0)
        self._real("repetition_penalty", 0.0, math.inf, open_low=True, hint="; 1 switches it off")
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._integer("seed", -(2**63), 2**64 - 1, optional=True)
        self._integer("max_new_tokens", 0, None, optional=True)
        self._integer("min_new_tokens", 0, None)
        self._integer("n", 1, MAX_CHOICES)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._set("stop", _stop_texts(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _some_ids("allowed_token_ids", self.allowed_token_ids))
        self._set("bad_words_ids", _sequences("bad_words_ids", self.bad_words_ids))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; RequestError for an unknown name (with the nearest known one)."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"unknown sampling parameter {name!r}{suggest(str(name), known)}")
        return cls(**values)

    def check_vocabulary(self, size: int) -> None:
        """RequestError if a bias, allowed id or bad word names an id outside a vocabulary of ``size`` rows.

        A stop id outside is harmless: it never comes.
        """
        bad_words = [token for word in self.bad_words_ids for token in word]
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("bad_words_ids", bad_words),
        ):
            outside = next((token for token in ids if token >= size), None)
            if outside is not None:
                raise RequestError(f"{name} names token id {outside}; the vocabulary has {size} rows")

    def answering(self) -> SamplingParams:
        """Itself, for who wants an answer; RequestError if it asks for none (``max_new_tokens`` 0 only scores)."""
        if self.max_new_tokens == 0:
            raise RequestError("max_new_tokens must be an integer of at least 1, got 0")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken (after penalties; the lower id on a tie)."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether any penalty changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen; only __post_init__ normalises

    def _real(self, name: str, low: float, high: float, *, open_low: bool = False, hint: str = "") -> None:
        raw = getattr(self, name)
        number = _as_float(raw)
        inside = number is not None and (low < number if open_low else low <= number) and number <= high
        if number is None or not inside:
            start = f"above {low:g}" if open_low else f"at least {low:g}"
            end = "" if math.isinf(high) else f" and at most {high:g}"
            raise RequestError(f"{name} must be a finite number {start}{end}, got {raw!r}{hint}")
        self._set(name, number)

    def _integer(
        self, name: str, low: int, high: int | None, *, optional: bool = False, hint: str = ""
    ) -> None:
        raw = getattr(self, name)
        if raw is None and optional:
            return
        number = _as_int(raw)
        if number is None or number < low or (high is not None and number > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            none = " or None" if optional else ""
            raise RequestError(f"{name} must be an integer {limits}{none}, got {raw!r}{hint}")
        self._set(name, number)


def _as_float(value: object) -> float | None:
    """A finite float, or None for anything else (bool and str included)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _as_int(value: object) -> int | None:
    """An int (NumPy integers too), or None for anything else (bool, str and float included)."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _stop_texts(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable) or isinstance(stop, bytes | Mapping):
        raise RequestError(f"stop must be a string or a list of strings, got {stop!r}")
    texts = tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop must hold non-empty strings, got {text!r}")
    return tuple(dict.fromkeys(texts))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    """Distinct ids in the order given."""
    return tuple(dict.fromkeys(_ids_in_order(name, value)))


def _some_ids(name: str, value: object) -> tuple[int, ...]:
    ids = _token_ids(name, value)
    if not ids:
        raise RequestError(f"{name} must hold at least one token id, got {value!r}")
    return ids


def _ids_in_order(name: str, value: object) -> list[int]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of token ids, got {value!r}")
    ids = []
    for item in value:
        number = _as_int(item)
        if number is None or number < 0:
            raise RequestError(f"{name} must hold ids of at least 0, got {item!r}")
        ids.append(number)
    return ids


def _sequences(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    """Distinct non-empty sequences of ids."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of lists of token ids, got {value!r}")
    words = []
    for item in value:
        word = tuple(_ids_in_order(name, item))
        if not word:
            raise RequestError(f"{name} must hold non-empty lists of token ids, got {item!r}")
        words.append(word)
    return tuple(dict.fromkeys(words))


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must be a mapping from token id to number, got {value!r}")
    bias = {}
    for key, raw in value.items():
        token = int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else _as_int(key)
        if token is None or token < 0:
            raise RequestError(f"logit_bias must have token ids of at least 0 as keys, got {key!r}")
        number = _as_float(raw)
        if number is None or abs(number) > MAX_BIAS:
            raise RequestError(
                f"logit_bias must have values from -{MAX_BIAS:g} to {MAX_BIAS:g}, got {raw!r} for token {token}"
            )
        bias[token] = number
    return bias
