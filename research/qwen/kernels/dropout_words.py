"""Dropout of adapters as few numbers: words per token, input and matrix, out of which the graph makes a mask.

Pure NumPy. A mask (T, n_in) of its own for every matrix is far more than a host can make or send in a step. So token t,
input j and the matrix have three random words each, and the input stays where ::

    ((a_t ^ a_m ^ a_j) * (b_t ^ b_m ^ b_j)  ^  c_t ^ c_m ^ c_j) & BITS  <  limit_t

a and b have 15 bits, so the product is exact in int32 on any device; c has the 16 bits that BITS looks at. The mask of
a token depends on nothing but (seed, step, copy of the model, place of the token among those it reads in the step,
matrix), however a copy is divided over devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]
BITS, SHIFT = 0x00FFFF00, 8
CHANCES = 65536  # a probability is a number of these
WIDTH = 4  # of a token: a, b, c, limit
_TOKENS, _INPUTS, _MATRIX = 1, 2, 3


def chances(rate: float) -> int:
    """How many of 65536 inputs stay."""
    return min(CHANCES, max(1, round((1.0 - rate) * CHANCES)))


def token_words(seed: int, step: int, copy: int, tokens: int, rate: float) -> Words:
    """(T, 4): a, b, c, limit of the tokens that a copy of the model reads in a step, in their order."""
    return _with_limit(_words([seed, _TOKENS, step, copy], tokens), chances(rate))


def quiet_words(tokens: int) -> Words:
    """(T, 4) with which every input stays."""
    return _with_limit(np.zeros((3, tokens), np.int32), CHANCES)


def input_words(seed: int, n_in: int) -> Words:
    """(3, n_in): a, b, c of the inputs; matrices of the same width share them."""
    return _words([seed, _INPUTS, n_in], n_in)


def matrix_words(seed: int, layer: int, matrix: int) -> Words:
    """(1, 4): a, b, c of a matrix, and 0."""
    return np.append(_words([seed, _MATRIX, layer, matrix], 1)[:, 0], np.int32(0)).reshape(1, WIDTH)


def _words(key: list[int], count: int) -> Words:
    raw: NDArray[np.uint64] = np.random.SFC64(key).random_raw(count)
    parts = (raw & 0x7FFF, raw >> 15 & 0x7FFF, (raw >> 30 & 0xFFFF) << SHIFT)
    return np.stack(parts).astype(np.int32)


def _with_limit(words: Words, limit: int) -> Words:
    last = np.full((1, words.shape[1]), limit << SHIFT, np.int32)
    return np.ascontiguousarray(np.concatenate([words, last]).T)
