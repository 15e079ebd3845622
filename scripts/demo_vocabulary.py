"""Train the demo model's own byte-level BPE vocabulary and write it in the tiktoken format.

It has the same form as the published vocabulary (256 bytes, then merges by rank) but is not that vocabulary.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex  # type: ignore[import-untyped]

# The split of the published tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Pair = tuple[bytes, bytes]


def train_bpe(texts: Iterable[str], num_ranks: int, min_count: int = 2) -> dict[bytes, int]:
    """Learn at most ``num_ranks - 256`` merges from the texts; the result maps token bytes to rank.

    Pairs never cross the pieces of the published split. Ties go to the smaller pair, so that the result
    depends on the texts alone. Characters beyond the BMP stay bytes on purpose: streaming the demo's emoji
    then shows that only whole characters come out.
    """
    words = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = Counter({word: n for word, n in words.items() if max(word) <= "\uffff"})
    pieces = {tuple(bytes([value]) for value in word.encode()): n for word, n in words.items()}
    ranks = {bytes([value]): value for value in range(256)}
    while len(ranks) < num_ranks:
        counts: Counter[Pair] = Counter()
        for piece, n in pieces.items():
            for pair in zip(piece, piece[1:], strict=False):
                counts[pair] += n
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < min_count:
            break
        ranks[best[0] + best[1]] = len(ranks)
        merged: Counter[tuple[bytes, ...]] = Counter()
        for piece, n in pieces.items():
            merged[_merge(piece, best)] += n
        pieces = dict(merged)
    return ranks


def _merge(piece: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
    result: list[bytes] = []
    at = 0
    while at < len(piece):
        if piece[at : at + 2] == pair:
            result.append(pair[0] + pair[1])
            at += 2
        else:
            result.append(piece[at])
            at += 1
    return tuple(result)


def write_vocabulary(ranks: dict[bytes, int], path: Path) -> None:
    """One line per token: base64 of its bytes, a blank, its rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered]
    path.write_text("".join(lines), encoding="ascii", newline="\n")
