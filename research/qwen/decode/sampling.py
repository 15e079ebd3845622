"""From a row of logits to a token: penalties, truncation and one seeded draw, in NumPy.

Order, as the published generation code has it: repetition penalty on all ids so far, presence and frequency
penalty on the generated ids (subtracted from the logits), the bias of the request, the caller's processors, the
bans of the request, temperature, top-k, top-p, min-p.

``candidates`` is the one place where truncation happens: ``probabilities`` spreads its answer over the
vocabulary and ``Sampler`` draws from it, so the tested distribution is the sampled one. All arithmetic is
float64 and relative to the peak, so it cannot overflow. Logits of -inf are banned tokens; NaN, +inf or a row
of nothing but -inf is a LogitsError. Ties at a cut are resolved in favour of lower ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.params import SamplingParams
from research.qwen.decode.processors import Logits, with_requested
from research.qwen.decode.processors import LogitsProcessor as LogitsProcessor
from research.qwen.decode.processors import Row as Row
from research.qwen.decode.processors import allow_only as allow_only
from research.qwen.errors import LogitsError
from research.qwen.messages import TokenLogprob

_GROUP = 16  # values per group when bounding the k-th largest value
_RUN = 256  # candidates per partial sum when drawing
_SORTABLE = 2048  # values that are cheaper to sort than to bucket once more
# top_p is reached within rounding: without this, ten equal tokens would need four to reach 0.3.
_MASS_SLACK = 1e-12


class PenaltyState:
    """Ids of one sequence and how often each was generated, kept up to date token by token."""

    def __init__(self, prompt_ids: Iterable[int], params: SamplingParams) -> None:
        self._repetition = params.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._slots = {int(token): slot for slot, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._slots, np.int64, len(self._slots))
        self._counts = np.zeros(len(self._slots))

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot >= len(self._ids):
            room = np.zeros(max(64, slot))
            self._ids = np.concatenate([self._ids, room.astype(np.int64)])
            self._counts = np.concatenate([self._counts, room])
        self._ids[slot] = token
        self._counts[slot] += 1

    def apply(self, scores: Row) -> None:
        """Penalise ``scores`` (V,) in place: x / r or x * r if seen, minus presence + frequency * count."""
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        before = scores[ids]
        with np.errstate(over="ignore"):
            values = np.where(before < 0, before * self._repetition, before / self._repetition)
        values -= self._presence * (counts > 0) + self._frequency * counts
        # An extreme penalty must not turn a finite score into an infinite one; a banned token stays banned.
        limit = np.finfo(np.float64).max
        scores[ids] = np.where(before == -np.inf, before, np.clip(values, -limit, limit))


def adjust(
    logits: Logits,
    ids: Sequence[int],
    penalties: PenaltyState | None = None,
    processors: Sequence[LogitsProcessor] = (),
) -> Row:
    """A float64 copy of the logits (V,) after penalties and processors.

    Raises LogitsError for a row that holds NaN, +inf or only -inf, or if a processor returns another shape.
    """
    _peak(logits)  # before a processor can hide a broken row
    scores = logits.astype(np.float64)
    if penalties is not None:
        penalties.apply(scores)
    for processor in processors:
        scores = np.asarray(processor(ids, scores), np.float64)
        if scores.shape != logits.shape:
            raise LogitsError(
                f"logits processor {processor!r} returned shape {scores.shape}, expected {logits.shape}"
            )
    return scores


def candidates(scores: Row, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Row]:
    """The tokens that temperature, top-k, top-p and min-p leave, in id order.

    Returns their ids (None = the whole vocabulary) and their weights: probabilities up to a common factor,
    1 for the best token. Raises LogitsError as the module says.
    """
    peak = _peak(scores)
    if params.greedy:
        return np.array([np.argmax(scores)]), np.ones(1)
    ids: NDArray[np.int64] | None = None
    if 0 < params.top_k < len(scores):
        ids = top_indices(scores, params.top_k)
        scores = scores[ids]
    with np.errstate(over="ignore", under="ignore"):
        weights = scores - peak
        weights /= params.temperature
        np.exp(weights, out=weights)  # in place: fresh memory for the whole vocabulary is what costs here
    if params.top_p < 1.0:
        ids, weights = _restrict(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0.0:
        ids, weights = _restrict(ids, weights, np.flatnonzero(weights >= params.min_p))
    return ids, weights


def probabilities(
    logits: Logits,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    generated_ids: Sequence[int] = (),
    processors: Sequence[LogitsProcessor] = (),
    end_ids: Collection[int] = (),
) -> Row:
    """(V,) float64: the distribution the next token is drawn from, given logits (V,) and the ids so far.

    ``end_ids`` are the ids that end an answer and may not come before ``params.min_new_tokens``.
    Raises LogitsError for a row that holds NaN, +inf or only -inf.
    """
    penalties = None
    if params.penalised:
        penalties = PenaltyState(prompt_ids, params)
        for token in generated_ids:
            penalties.add(token)
    chain = with_requested(params, len(prompt_ids), end_ids, processors)
    ids, weights = candidates(adjust(logits, [*prompt_ids, *generated_ids], penalties, chain), params)
    full = np.zeros(len(logits))
    full[slice(None) if ids is None else ids] = weights / weights.sum()
    return full


def uniform(seed: int, choice: int, step: int) -> float:
    """The number in [0, 1) for token ``step`` of choice ``choice``: a pure function of its arguments.

    Philox keyed by seed and choice, with the step as its counter; 53 bits of its first output.
    """
    key = np.array([seed % 2**64, choice], np.uint64)  # a list would pass through float64 and lose bits
    philox = np.random.Philox(key=key, counter=np.array([step, 0, 0, 0], np.uint64))
    return float(int(philox.random_raw()) >> 11) * 2.0**-53


def draw(ids: NDArray[np.int64] | None, weights: Row, u: float) -> int:
    """Inverse of the cumulative distribution over the candidates in id order, at ``u`` in [0, 1)."""
    starts = np.arange(0, len(weights), _RUN)
    sums = np.add.reduceat(weights, starts)  # a running sum of the whole vocabulary takes ten times as long
    target = u * float(sums.sum())
    run = _reaching(sums, target)
    first = int(starts[run])
    position = first + _reaching(weights[first : first + _RUN], target - float(sums[:run].sum()))
    return position if ids is None else int(ids[position])


def _reaching(weights: Row, target: float) -> int:
    """The first index where the running sum exceeds ``target``; never one without weight."""
    cumulative = weights.cumsum()
    # Rounding may put the target at or past the sum: the last index with weight is meant then.
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return min(int(np.searchsorted(cumulative, target, side="right")), last)


def token_logprob(logits: Logits, token: int, top: int) -> TokenLogprob:
    """Log-softmax of the unmodified logits (V,): for ``token``, and for the ``top`` best, best first."""
    peak = _peak(logits)
    with np.errstate(over="ignore"):
        scores = logits - logits.dtype.type(
            peak
        )  # float32 stays: a relative error of 1e-7, at a third of the time
    normaliser = peak + float(np.log(np.exp(scores, out=scores).sum(dtype=np.float64)))
    best = top_indices(logits, top) if top else np.empty(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(
        id=token,
        logprob=float(logits[token]) - normaliser,
        top=tuple((int(i), float(logits[i]) - normaliser) for i in best),
    )


def top_indices(scores: Logits, k: int) -> NDArray[np.int64]:
    """Indices of the k largest values in ascending order; among equal values the lower indices."""
    k = min(k, len(scores))
    groups = len(scores) // _GROUP
    pool = scores
    if k <= groups:
        # k groups have a maximum of at least the k-th largest maximum, so k values do: none below counts.
        maxima = scores[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        pool = scores[scores >= np.partition(maxima, groups - k)[groups - k]]
    cut = np.partition(pool, len(pool) - k)[len(pool) - k]
    return _from_cut(scores, cut, int((pool >= cut).sum()) - k)


class Sampler:
    """Draws the tokens of one choice of one request, one after another.

    Token number ``step`` uses ``uniform(seed, choice, step)`` and nothing else, so the same request with the
    same seed gives the same tokens whatever runs beside it.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int | None = None,
        choice: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        end_ids: Collection[int] = (),
    ) -> None:
        """``seed`` replaces ``params.seed``; None in both draws fresh entropy. ``end_ids`` end the answer."""
        if seed is None:
            seed = params.seed
        self.params = params
        self.seed = secrets.randbits(64) if seed is None else seed
        self._choice = choice
        self._processors = with_requested(params, len(prompt_ids), end_ids, processors)
        self._penalties = PenaltyState(prompt_ids, params) if params.penalised else None
        self._step = 0

    def next(self, logits: Logits, ids: Sequence[int]) -> tuple[int, TokenLogprob | None]:
        """The next token from logits (V,), left unchanged; the processors see ``ids`` (prompt and generated).

        Raises LogitsError for a row that holds NaN, +inf or only -inf.
        """
        if self.params.greedy and self._penalties is None and not self._processors:
            _peak(logits)
            token = int(np.argmax(logits))
        else:
            kept, weights = candidates(adjust(logits, ids, self._penalties, self._processors), self.params)
            token = draw(kept, weights, uniform(self.seed, self._choice, self._step))
        wanted = self.params.logprobs
        logprob = None if wanted is None else token_logprob(logits, token, wanted)
        if self._penalties is not None:
            self._penalties.add(token)
        self._step += 1
        return token, logprob


def _peak(scores: Logits) -> float:
    """The largest value; LogitsError unless it is finite (max passes NaN on)."""
    peak = float(scores.max())
    if np.isfinite(peak):
        return peak
    if peak == -np.inf:
        raise LogitsError(
            "every token is banned: the logits are all -inf (allowed_token_ids, bad_words_ids and the "
            "logits processors together leave none)"
        )
    raise LogitsError(
        f"logits hold {'NaN' if np.isnan(peak) else '+inf'}: the computation overflowed or the weights are "
        "damaged; try dtype float32 (or bfloat16), and check the checkpoint"
    )


def _nucleus(weights: Row, top_p: float) -> NDArray[np.int64]:
    """Indices (ascending) of the smallest set of largest weights whose share of the sum reaches ``top_p``."""
    total = float(weights.sum())
    target = top_p * total * (1.0 - _MASS_SLACK)
    # All weights below this floor together are less than 1 - top_p of the sum: none is in the set.
    floor = (1.0 - top_p) * total / len(weights)
    eligible = np.flatnonzero(weights >= floor)  # indices: a mask that is half full is three times slower
    weights = pool = weights[eligible]
    above = 0.0  # sum of the weights known to be in the set and dropped from the pool
    # Positive floats order as their bit patterns do. Bucket by the leading bits, keep the bucket in which the
    # target is reached, go on with the next bits: linear time where a sort of the vocabulary is not.
    for shift in (44, 32, 20, 8):
        if len(pool) <= _SORTABLE:
            break
        buckets = pool.view(np.int64) >> shift
        buckets -= buckets.min()
        sums = np.bincount(buckets, weights=pool)[::-1].cumsum()
        crossing = min(int(np.searchsorted(sums, target - above)), len(sums) - 1)
        above += float(sums[crossing - 1]) if crossing else 0.0
        pool = pool[np.flatnonzero(buckets == len(sums) - 1 - crossing)]
    ordered = np.sort(pool)[::-1]
    reached = min(int(np.searchsorted(above + ordered.cumsum(), target)), len(ordered) - 1)
    cut = ordered[reached]
    return eligible[_from_cut(weights, cut, int((ordered >= cut).sum()) - 1 - reached)]


def _from_cut(values: Logits, cut: float, surplus: int) -> NDArray[np.int64]:
    """Indices (ascending) of the values >= ``cut``, without the last ``surplus`` of those equal to it."""
    chosen = np.flatnonzero(values >= cut)
    if surplus:
        ties = np.flatnonzero(values[chosen] == cut)
        chosen = np.delete(chosen, ties[-surplus:])
    return chosen


def _restrict(
    ids: NDArray[np.int64] | None, weights: Row, kept: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Row]:
    return (kept if ids is None else ids[kept]), weights[kept]
