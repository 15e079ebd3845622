"""Conversations as training samples: the turns of inference with labels, so that training sees what serving sends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, Literal, get_args

from research.qwen.errors import ConfigError
from research.qwen.messages import Message, Role
from research.qwen.text import chatml
from research.qwen.text.nfc import to_nfc
from research.qwen.text.tokenizer import QwenTokenizer

IGNORE: Final = -100  # label of a position nothing is learned from

MaskKind = Literal["published", "assistant"]
SpecialsKind = Literal["published", "text"]
TruncationKind = Literal["published", "turns"]


@dataclass(frozen=True)
class DataOptions:
    """How conversations become samples; the defaults are those of the published fine-tuning script.

    Attributes:
        max_length: tokens a sample may have; longer ones are shortened.
        mask: what is learned. "published": answers, and ``<|im_start|>``, ``<|im_end|>`` and the newline after it of
            every turn. "assistant": the words of the assistant and its ``<|im_end|>``; results of tools inside its
            turn are not its words.
        specials: "published": control tokens written in a text count as such. "text": no text yields control ids.
        truncation: "published": cut after ``max_length`` tokens. "turns": see ``fit_exchanges``.
        system: system message of conversations that have none of their own; the turn is there even if it is empty.
    """

    max_length: int = 2048
    mask: MaskKind = "published"
    specials: SpecialsKind = "published"
    truncation: TruncationKind = "published"
    system: str = chatml.DEFAULT_SYSTEM

    def __post_init__(self) -> None:
        """ConfigError for a value that is not known."""
        known = {"mask": MaskKind, "specials": SpecialsKind, "truncation": TruncationKind}
        for name, kinds in known.items():
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(
                    f"{name}: unknown value {getattr(self, name)!r}; known are {', '.join(get_args(kinds))}"
                )
        length = self.max_length
        if not isinstance(length, int) or isinstance(length, bool) or length < 2:
            raise ConfigError(f"max_length: expected a whole number of at least 2 tokens, got {length!r}")


@dataclass(frozen=True)
class Sample:
    """Token ids with their labels, aligned (not shifted); ``IGNORE`` where nothing is learned.

    ``hidden`` are positions that attention skips: in the published mask every ``<|endoftext|>``, also one inside a
    text. ``full`` is the number of tokens before shortening, ``answer`` how many labels are words of answers.
    """

    ids: list[int]
    labels: list[int]
    hidden: tuple[int, ...] = ()
    full: int = 0
    answer: int = 0

    @property
    def trained(self) -> int:
        """Tokens that are learned: the first is predicted by nothing."""
        return len(self.labels) - self.labels.count(IGNORE) - (self.labels[:1] not in ([], [IGNORE]))


@dataclass(frozen=True)
class Turn:
    """One turn of a sample.

    ``words`` are the (start, end) characters of ``content`` that the assistant says and that are learned, None if
    nothing of the turn is. A turn that is not ``closed`` ends with its text, as an answer does that waits for a tool.
    """

    role: Role
    content: str
    words: tuple[tuple[int, int], ...] | None = None
    closed: bool = True


Dialogue = Sequence[Turn]


@dataclass
class _Part:
    """Ids and labels of a turn."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answer: int = 0


def render(dialogue: Dialogue, tokenizer: QwenTokenizer, options: DataOptions) -> Sample:
    """Return the sample of one dialogue, shortened to ``options.max_length`` tokens.

    With truncation "turns" it is empty if no exchange fits.
    """
    parts = [_part(turn, tokenizer, options) for turn in dialogue]
    full = sum(len(part.ids) for part in parts)
    if full > options.max_length and options.truncation == "turns":
        parts = [parts[n] for n in fit_exchanges(dialogue, [len(p.ids) for p in parts], options.max_length)]
    ids = [i for part in parts for i in part.ids]
    labels = [label for part in parts for label in part.labels]
    answer = sum(part.answer for part in parts)
    if len(ids) > options.max_length:
        ids, labels = ids[: options.max_length], labels[: options.max_length]
        answer = _answer_left(parts, options.max_length)
    return Sample(ids, labels, hidden_positions(ids, tokenizer, options), full, answer)


def fit_exchanges(dialogue: Dialogue, sizes: Sequence[int], room: int) -> list[int]:
    """Numbers of the turns that stay so that at most ``room`` tokens are left; empty if no answer fits.

    An exchange is a user turn with everything up to the next one. As in a chat that outgrows its window, the system
    turn and the newest exchanges stay and the oldest go; but an exchange that is too long by itself ends the sample
    before it. Turns are whole, so the closing ``<|im_end|>`` is always there.
    """
    head = [n for n, turn in enumerate(dialogue) if turn.role == "system" and n == 0]
    starts = [n for n, turn in enumerate(dialogue) if turn.role == "user" and n >= len(head)]
    if not starts or starts[0] != len(head):
        starts.insert(0, len(head))
    exchanges = [list(range(a, b)) for a, b in pairwise([*starts, len(dialogue)])]
    room -= sum(sizes[n] for n in head)
    kept: list[int] = []
    for exchange in reversed(exchanges):
        size = sum(sizes[n] for n in exchange)
        if size > room and kept:
            break
        # What comes after the last answer teaches nothing; without it the answer may fit.
        if size <= room and (kept or any(dialogue[n].words is not None for n in exchange)):
            kept = exchange + kept
            room -= size
    return head + kept if kept else []


def hidden_positions(ids: Sequence[int], tokenizer: QwenTokenizer, options: DataOptions) -> tuple[int, ...]:
    """Positions that attention skips: the published script takes every ``<|endoftext|>`` for padding."""
    if options.mask != "published" or tokenizer.eod_id not in ids:
        return ()
    return tuple(n for n, i in enumerate(ids) if i == tokenizer.eod_id)


def whole_turns(messages: Iterable[Message]) -> list[Turn]:
    """Plain turns; what the assistant says is learned wholly."""
    return [
        Turn(m.role, m.content, ((0, len(m.content)),) if m.role == "assistant" else None) for m in messages
    ]


def _part(turn: Turn, tokenizer: QwenTokenizer, options: DataOptions) -> _Part:
    pieces = chatml.turn_ids(
        Message(turn.role, turn.content), tokenizer, specials=options.specials == "published"
    )
    if not turn.closed:
        pieces = chatml.TurnIds(pieces.header, pieces.body[:-1], [])
    published = options.mask == "published"
    body = _said(turn, pieces.body, tokenizer, published)
    answer = len(body) - body.count(IGNORE)
    header, tail = [IGNORE] * len(pieces.header), [IGNORE] * len(pieces.tail)
    if published:
        # The published rule: the marks of every turn are learned, the names of the roles are not.
        header[0], tail = pieces.header[0], pieces.tail
        if turn.closed:
            body[-1] = pieces.body[-1]
    return _Part(pieces.joined(), header + body + tail, answer)


def _said(turn: Turn, body: list[int], tokenizer: QwenTokenizer, whole: bool) -> list[int]:
    """Labels of the content and its ``<|im_end|>``."""
    if turn.words is None:
        return [IGNORE] * len(body)
    if whole or turn.words == ((0, len(turn.content)),):
        return list(body)
    text = body[:-1] if turn.closed else body
    return _label_words(turn, text, tokenizer) + body[len(text) :]


def _label_words(turn: Turn, ids: list[int], tokenizer: QwenTokenizer) -> list[int]:
    """Labels of a content: a token is learned if all of its bytes are words of the assistant."""
    assert turn.words is not None
    # Offsets are those of the encoded bytes, so the stretches are normalised as the encoder does it.
    edges = [0, *(edge for span in turn.words for edge in span), len(turn.content)]
    sizes = [len(_encoded(turn.content[a:b])) for a, b in pairwise(edges)]
    ends = list(accumulate(sizes))
    spans = list(zip(ends[0::2], ends[1::2], strict=False))
    labels, at = [], 0
    for token in ids:
        start, at = at, at + len(tokenizer.token_bytes(token))
        labels.append(token if any(a <= start and at <= b for a, b in spans) else IGNORE)
    return labels


def _encoded(text: str) -> bytes:
    try:
        return to_nfc(text).encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, which the encoder takes for U+FFFD
        return (
            to_nfc(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")
        )


def _answer_left(parts: Sequence[_Part], room: int) -> int:
    """Words of answers among the first ``room`` tokens."""
    left = 0
    for part in parts:
        if room >= len(part.ids):
            left += part.answer
        elif part.answer:
            left += sum(label != IGNORE for label in part.labels[1:room])
        room -= min(room, len(part.ids))
    return left
