"""What a request may ask of decoding: one frozen value, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from research.qwen.config import suggest
from research.qwen.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling, penalties, length and stops of one request; RequestError names a bad field and its value.

    ``temperature`` 0 or ``top_k`` 1 is greedy decoding. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and penalties
    1, 0, 0 are off. ``seed`` None draws a fresh one. ``max_new_tokens`` None runs to the end of the context.
    ``stop`` holds texts (a bare string is taken as one), ``stop_token_ids`` ids; ``ignore_eos`` switches off
    the model's own end ids only. ``logprobs`` None reports nothing, 0 the chosen token, k also the k best ones.
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

    def __post_init__(self) -> None:
        self._real("temperature", 0.0, math.inf)
        self._integer("top_k", 0, None, hint="; 0 switches it off")
        self._real("top_p", 0.0, 1.0, open_low=True, hint="; 1 switches it off")
        self._real("min_p", 0.0, 1.0)
        self._real("repetition_penalty", 0.0, math.inf, open_low=True, hint="; 1 switches it off")
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._integer("seed", -(2**63), 2**64 - 1, optional=True)
        self._integer("max_new_tokens", 1, None, optional=True)
        self._integer("n", 1, MAX_CHOICES)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._set("stop", _stop_texts(self.stop))
        self._set("stop_token_ids", _stop_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; RequestError for an unknown name (with the nearest known one)."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"unknown sampling parameter {name!r}{suggest(str(name), known)}")
        return cls(**values)

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


def _stop_ids(stop: object) -> tuple[int, ...]:
    if isinstance(stop, str | bytes | Mapping) or not isinstance(stop, Iterable):
        raise RequestError(f"stop_token_ids must be a list of token ids, got {stop!r}")
    ids = []
    for item in stop:
        number = _as_int(item)
        if number is None or number < 0:
            raise RequestError(f"stop_token_ids must hold ids of at least 0, got {item!r}")
        ids.append(number)
    return tuple(dict.fromkeys(ids))
