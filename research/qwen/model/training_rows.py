"""From the rows of a batch to what a training graph takes. Imports no MindSpore.

Padding is dropped: the texts of all rows (a packed row holds several) follow one another as T tokens. Only attention
needs places: texts are laid side by side into N rows of L places, L being the longest text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import TrainingError
from research.qwen.rope import inverse_frequencies

IGNORED = -100
MASKED = np.float32(-1e30)  # added to a score that is not to be seen


class BatchLike(Protocol):
    """Arrays (B, S) of one batch; padding has segment -1, the texts of a row segments 0, 1, 2, ..."""

    @property
    def ids(self) -> NDArray[np.int32]: ...

    @property
    def labels(self) -> NDArray[np.int32]: ...

    @property
    def positions(self) -> NDArray[np.int32]: ...

    @property
    def segments(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Rows:
    """T tokens of a batch, ready for the graphs.

    ``ids`` (T,) int32; ``targets`` (R,) the ids to predict and ``rows`` (R,) the tokens that predict them; ``places``
    (T,) where each token lies in the batch, counted row by row; ``lengths`` of the texts; ``rotary``: cos and sin
    (T, 1, d / 2).
    """

    ids: NDArray[np.int32]
    rows: NDArray[np.int32]
    targets: NDArray[np.int32]
    places: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rotary: tuple[NDArray[np.float32], NDArray[np.float32]]

    @property
    def tokens(self) -> int:
        """How many next tokens are learned from."""
        return len(self.targets)

    @property
    def bounds(self) -> NDArray[np.int32]:
        """(texts + 1,): text i has the tokens bounds[i] .. bounds[i + 1]."""
        return np.r_[0, np.cumsum(self.lengths)].astype(np.int32)

    @property
    def layout(self) -> tuple[NDArray[Any], ...]:
        """Places of the tokens for attention by plain operators: see kernels.training."""
        return _layout(self.lengths)


def count_targets(batch: BatchLike) -> int:
    """How many next tokens of a batch are learned from."""
    return int(_learned(batch).sum())


def flatten(batch: BatchLike, config: QwenConfig) -> Rows:
    """The rows of a batch. TrainingError if it holds no token, an id outside the vocabulary, or misfit shapes."""
    ids, labels = batch.ids, batch.labels
    segments, positions = batch.segments, batch.positions
    if ids.ndim != 2 or not ids.shape == labels.shape == segments.shape == positions.shape:
        raise TrainingError(f"a batch needs four arrays (rows, length) of one shape, got ids {ids.shape}")
    places = np.flatnonzero(segments.reshape(-1) >= 0)
    if not places.size:
        raise TrainingError("a batch without a token")
    taken = ids.reshape(-1)[places]
    learned = _learned(batch).reshape(-1)[places]
    targets = np.roll(labels.reshape(-1), -1)[places][learned]
    for what, values in (("token id", taken), ("label", targets)):
        if values.size and not 0 <= values.min() <= values.max() < config.vocab_size:
            bad = int(values[(values < 0) | (values >= config.vocab_size)][0])
            raise TrainingError(f"{what} {bad} is outside the vocabulary of {config.vocab_size} rows")
    owner = (places // ids.shape[1], segments.reshape(-1)[places])
    starts = np.flatnonzero(np.r_[True, (np.diff(owner[0]) != 0) | (np.diff(owner[1]) != 0)])
    lengths = np.diff(np.r_[starts, len(places)])
    return Rows(
        np.ascontiguousarray(taken, np.int32),
        np.flatnonzero(learned).astype(np.int32),
        np.ascontiguousarray(targets, np.int32),
        places,
        lengths,
        _rotary(positions.reshape(-1)[places], config),
    )


def _learned(batch: BatchLike) -> NDArray[np.bool_]:
    """(B, S) whether the next token is of the same text and not ignored."""
    out = np.zeros(batch.ids.shape, np.bool_)
    same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] >= 0)
    out[:, :-1] = same & (batch.labels[:, 1:] != IGNORED)
    return out


def _rotary(
    positions: NDArray[np.int32], config: QwenConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin (T, 1, d / 2); no NTK in training, as published."""
    frequencies = inverse_frequencies(config.head_dim, config.rotary_emb_base, 1.0)
    angles = positions.astype(np.float32)[:, None, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _layout(lengths: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    """pad (N, L) the token of each place, unpad (T,) the place of each token, inside (N, L, 1), mask."""
    longest = int(lengths.max())
    row_of, column_of, count = _beside(lengths, longest)
    first = np.cumsum(lengths) - lengths
    text = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(int(lengths.sum())) - first[text]
    unpad = (row_of[text] * longest + column_of[text] + within).astype(np.int32)
    pad = np.zeros(count * longest, np.int32)
    pad[unpad] = np.arange(len(unpad))
    inside = np.zeros((count * longest, 1), np.float32)
    inside[unpad] = 1.0
    mask = _triangle(longest)
    if count != len(lengths):  # some rows hold several texts
        owner = np.full(count * longest, -1)
        owner[unpad] = text
        owner = owner.reshape(count, longest)
        same = owner[:, :, None] == owner[:, None, :]
        mask = np.where(same[:, None], mask, MASKED)
    shaped = pad.reshape(count, longest)
    return shaped, unpad, inside.reshape(count, longest, 1), mask


def _beside(lengths: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Row and first column of each text, the longest placed first, each in the first row with room for it."""
    row, column = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    used = np.zeros(len(lengths), np.int64)
    for text in np.argsort(-lengths, kind="stable"):
        at = int(np.argmax(used + lengths[text] <= room))
        row[text], column[text] = at, used[at]
        used[at] += lengths[text]
    return row, column, int((used > 0).sum())


@lru_cache(maxsize=4)
def _triangle(length: int) -> NDArray[np.float32]:
    mask = np.triu(np.full((1, 1, length, length), MASKED, np.float32), 1)
    mask.flags.writeable = False
    return mask
