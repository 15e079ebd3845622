"""The vocabulary file: where it is found, how it is read and checked, the control tokens that follow it."""

from __future__ import annotations

import binascii
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from research.qwen.errors import VocabularyError

VOCAB_NAME = "qwen.tiktoken"
VOCAB_ENV = "QWEN_TIKTOKEN"

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
CONTROL_TOKENS: tuple[str, ...] = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

StrPath = str | os.PathLike[str]


def find_vocab_file(vocab_file: StrPath | None = None, folder: StrPath | None = None) -> Path:
    """Return the absolute path of the vocabulary file.

    Looks at: ``vocab_file`` (a file, or a folder holding qwen.tiktoken), ``folder``/qwen.tiktoken, the
    environment variable QWEN_TIKTOKEN, the installed ``dashscope`` package. What was named explicitly must
    exist; only an absent ``folder``/qwen.tiktoken lets the search go on.

    Raises:
        VocabularyError: nothing was found; the message says how to get the file.
    """
    if vocab_file is not None:
        return _existing(vocab_file, "vocab_file")
    if folder is not None and (Path(folder) / VOCAB_NAME).is_file():
        return (Path(folder) / VOCAB_NAME).absolute()
    if os.environ.get(VOCAB_ENV):
        return _existing(os.environ[VOCAB_ENV], f"the environment variable {VOCAB_ENV}")
    # find_spec of a top-level name does not import the package.
    spec = importlib.util.find_spec("dashscope")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / "resources" / VOCAB_NAME
        if path.is_file():
            return path.absolute()
    where = f" in {folder}," if folder is not None else ""
    raise VocabularyError(
        f"no vocabulary file {VOCAB_NAME}:{where} not in ${VOCAB_ENV}, not in the dashscope package; copy it "
        f"from a downloaded Qwen checkpoint, set {VOCAB_ENV}=/path/to/{VOCAB_NAME}, or "
        "run: pip install dashscope"
    )


def _existing(path: StrPath, origin: str) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / VOCAB_NAME
    if not file.is_file():
        raise VocabularyError(f"vocabulary file {file} (given by {origin}) does not exist")
    return file.absolute()


def load_ranks(path: Path) -> dict[bytes, int]:
    """Read a vocabulary of lines "base64 rank" into token bytes -> rank.

    Raises:
        VocabularyError: bad base64, a rank that is not a number, a duplicate, ranks that are not 0..n-1, or a
            single byte without a token; names the file, and the line where there is one.
    """
    data = _read(path)
    ranks = _parse_regular(data)
    if ranks is None:
        ranks = _parse_checked(path, data)
    if not ranks:
        raise VocabularyError(f"{path}: the vocabulary is empty")
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise VocabularyError(
            f"{path}: no token for the single byte 0x{missing[0]:02x} ({len(missing)} of 256 missing); "
            f"this is not a complete Qwen vocabulary"
        )
    return ranks


def load_extra_ranks(path: Path, ranks: dict[bytes, int], first_id: int) -> dict[bytes, int]:
    """Read an additional vocabulary whose ids start at or after ``first_id``; its tokens must be new.

    Raises:
        VocabularyError: a malformed line, an id below ``first_id``, or a duplicate; names file and line.
    """
    extra: dict[bytes, int] = {}
    taken: set[int] = set()
    for line, token, rank in _lines(path, _read(path)):
        if rank < first_id:
            raise VocabularyError(f"{path}:{line}: id {rank} is taken; additional ids start at {first_id}")
        if token in ranks or token in extra or rank in taken:
            raise VocabularyError(f"{path}:{line}: duplicate token or id {rank}; every addition must be new")
        extra[token] = rank
        taken.add(rank)
    return extra


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"cannot read the vocabulary {path}: {error.strerror}") from error


def _parse_regular(data: bytes) -> dict[bytes, int] | None:
    """Parse a flawless file in bulk; None sends the file to the slower line-by-line reader."""
    fields = data.split()
    count = len(fields) // 2
    if len(fields) != 2 * count or len(data.splitlines()) != count:
        return None
    decode = binascii.a2b_base64
    try:
        tokens = [decode(field, strict_mode=True) for field in fields[::2]]
        if list(map(int, fields[1::2])) != list(range(count)):
            return None
    except ValueError:
        return None
    ranks = dict(zip(tokens, range(count), strict=True))
    return ranks if len(ranks) == count else None


def _parse_checked(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for line, token, rank in _lines(path, data):
        if token in ranks:
            raise VocabularyError(
                f"{path}:{line}: duplicate token, first seen in line {line_of[ranks[token]]} "
                f"with rank {ranks[token]}"
            )
        if rank in line_of:
            raise VocabularyError(f"{path}:{line}: duplicate rank {rank}, first seen in line {line_of[rank]}")
        ranks[token] = rank
        line_of[rank] = line
    for rank in sorted(line_of):
        if rank >= len(ranks):
            hole = next(number for number in range(len(ranks)) if number not in line_of)
            raise VocabularyError(
                f"{path}:{line_of[rank]}: rank {rank}, but ranks must be 0..{len(ranks) - 1} "
                f"and {hole} is missing"
            )
    return ranks


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (line number, token bytes, rank) of every line that is not blank."""
    for number, line in enumerate(data.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise VocabularyError(f"{path}:{number}: expected 'base64 rank', got {_shown(line)}")
        if not fields[1].isdigit():
            raise VocabularyError(f"{path}:{number}: rank {_shown(fields[1])} is not a number")
        try:
            yield number, binascii.a2b_base64(fields[0], strict_mode=True), int(fields[1])
        except ValueError as error:
            raise VocabularyError(f"{path}:{number}: bad base64 {_shown(fields[0])}: {error}") from error


def _shown(field: bytes) -> str:
    text = repr(field[:40])[1:]
    return text + "..." if len(field) > 40 else text
