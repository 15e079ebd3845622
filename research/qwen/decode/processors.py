"""Functions that change a row of logits before a token is drawn, and those that a request asks for by value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.params import SamplingParams

Row = NDArray[np.float64]
Logits = NDArray[np.floating[Any]]
# (all ids of the sequence so far, logits (V,) float64) -> logits (V,); it may change the row in place.
LogitsProcessor = Callable[[Sequence[int], Row], Row]


def allow_only(ids: Iterable[int]) -> LogitsProcessor:
    """A processor that bans every token but ``ids``."""
    allowed = np.unique(np.fromiter(ids, np.int64))

    def ban_others(_: Sequence[int], scores: Row) -> Row:
        kept = np.full_like(scores, -np.inf)
        kept[allowed] = scores[allowed]
        return kept

    return ban_others


def add_bias(tokens: Iterable[int], values: Iterable[float]) -> LogitsProcessor:
    """A processor that adds ``values`` to the logits of ``tokens``, each of which comes once."""
    ids, amounts = np.fromiter(tokens, np.int64), np.fromiter(values, np.float64)

    def bias(_: Sequence[int], scores: Row) -> Row:
        scores[ids] += amounts
        return scores

    return bias


def ban_sequences(sequences: Sequence[Sequence[int]], start: int) -> LogitsProcessor:
    """A processor that bans the last id of a sequence where the ids before it stand, from place ``start`` on."""
    always = np.array([s[0] for s in sequences if len(s) == 1], np.int64)
    longer = [(list(s[:-1]), s[-1]) for s in sequences if len(s) > 1]

    def ban(ids: Sequence[int], scores: Row) -> Row:
        scores[always] = -np.inf
        new = len(ids) - start
        for head, last in longer:
            if len(head) <= new and list(ids[-len(head) :]) == head:
                scores[last] = -np.inf
        return scores

    return ban


def ban_before(ids: Iterable[int], length: int) -> LogitsProcessor:
    """A processor that bans ``ids`` while the sequence has fewer than ``length`` ids.

    Where no other token is left (a finished grammar allows nothing but an end), they stay allowed.
    """
    known = np.unique(np.fromiter(ids, np.int64))

    def ban(seen: Sequence[int], scores: Row) -> Row:
        if len(seen) < length:
            banned = known[known < len(scores)]  # a stop id may lie outside the vocabulary
            kept = scores[banned]
            scores[banned] = -np.inf
            if scores.max() == -np.inf:
                scores[banned] = kept
        return scores

    return ban


def with_requested(
    params: SamplingParams,
    prompt_length: int,
    end_ids: Collection[int] = (),
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[LogitsProcessor, ...]:
    """``processors`` between what ``params`` asks for: the bias before them, so that no bias lifts a ban."""
    chain: list[LogitsProcessor] = []
    if params.logit_bias:
        chain.append(add_bias(params.logit_bias.keys(), params.logit_bias.values()))
    chain += processors
    if params.allowed_token_ids is not None:
        chain.append(allow_only(params.allowed_token_ids))  # ends an answer only if it holds an end id
    if params.bad_words_ids:
        chain.append(ban_sequences(params.bad_words_ids, prompt_length))
    if params.min_new_tokens and end_ids:
        chain.append(ban_before(end_ids, prompt_length + params.min_new_tokens))
    return tuple(chain)
