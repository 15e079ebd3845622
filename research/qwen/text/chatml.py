"""ChatML: the one place where messages become token ids and where control ids arise.

Role, newline and content are encoded separately, contents without special tokens: whatever a user writes, it
cannot open or close a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, get_args

from research.qwen.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE
from research.qwen.chat_template import DEFAULT_SYSTEM as DEFAULT_SYSTEM
from research.qwen.errors import PromptError
from research.qwen.messages import Message, Role
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.text.vocabulary import END_OF_TEXT, IM_END, IM_START

CHAT_FORMATS: Final = ("chatml", "raw")


class TurnIds(NamedTuple):
    """Token ids of one turn, in order; ``body`` (content and ``<|im_end|>``) is what its author says."""

    header: list[int]
    body: list[int]
    tail: list[int]

    def joined(self) -> list[int]:
        """The whole turn."""
        return self.header + self.body + self.tail


def render(
    messages: Sequence[Message], tokenizer: QwenTokenizer, *, add_generation_prompt: bool = True
) -> list[int]:
    """Return the token ids of a conversation; without a system message there is no system turn.

    Raises:
        PromptError: no messages, an unknown role, or tool calls (the models know these only as ReAct text).
    """
    _check(messages)
    ids = [i for message in messages for i in turn_ids(message, tokenizer).joined()]
    return ids + _header("assistant", tokenizer) if add_generation_prompt else ids


def render_text(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Return what ``render`` encodes as text, for people to read: the ids cannot be recovered from it.

    Raises:
        PromptError: as ``render``.
    """
    _check(messages)
    text = "".join(f"{IM_START}{m.role}\n{m.content}{IM_END}\n" for m in messages)
    return f"{text}{IM_START}assistant\n" if add_generation_prompt else text


def make_context(
    tokenizer: QwenTokenizer,
    query: str,
    history: Iterable[Sequence[str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """Build the prompt of the published chat interface: (text as given, token ids).

    The system turn is always there, even if empty. Pairs of ``history`` are taken from the newest on while
    system, pair and the pairs so far have fewer than ``max_window_size`` tokens; the query is not counted.
    "raw" is the bare query for base models; there alone control tokens in the text count as such.

    Raises:
        PromptError: an unknown chat format.
    """
    if _checked_format(chat_format) == "raw":
        return query, tokenizer.encode(query, allowed_special="all")
    head = Message("system", system)
    room = (
        max_window_size - len(turn_ids(head, tokenizer).joined()) + 1
    )  # the newline after it is not counted
    kept: list[Message] = []
    for user, assistant, *_ in reversed(list(history or ())):
        pair = [Message("user", user), Message("assistant", assistant)]
        room -= sum(len(turn_ids(message, tokenizer).joined()) for message in pair)
        if room <= 0:
            break
        kept = pair + kept
    messages = [head, *kept, Message("user", query)]
    return render_text(messages), render(messages, tokenizer)


def fit(messages: Sequence[Message], tokenizer: QwenTokenizer, max_tokens: int) -> list[Message]:
    """Drop the oldest turns until ``render`` with its generation prompt gives at most ``max_tokens`` ids.

    A turn is a user message with everything up to the next one; the leading system messages and the last turn
    stay.

    Raises:
        PromptError: what must stay does not fit, or as ``render``.
    """
    _check(messages)
    turns = _split_turns(messages)
    sizes = [sum(len(turn_ids(message, tokenizer).joined()) for message in turn) for turn in turns]
    # turns[0] is the system part, possibly empty.
    total = sum(sizes) + len(_header("assistant", tokenizer))
    first = 1
    while total > max_tokens and first < len(turns) - 1:
        total -= sizes[first]
        first += 1
    if total > max_tokens:
        raise PromptError(
            f"the prompt is too long: system message and last turn have {total} tokens, {max_tokens} fit; "
            f"shorten them"
        )
    return [message for turn in (turns[0], *turns[first:]) for message in turn]


def stop_ids(tokenizer: QwenTokenizer, chat_format: str = "chatml") -> tuple[int, ...]:
    """Return the ids that end an answer: chatml im_end, im_start, endoftext; raw endoftext.

    Raises:
        PromptError: an unknown chat format.
    """
    if _checked_format(chat_format) == "raw":
        return (tokenizer.eod_id,)
    return tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id


def decode_response(
    tokens: Sequence[int],
    context_length: int,
    tokenizer: QwenTokenizer,
    chat_format: str = "chatml",
    *,
    errors: str = "replace",
) -> tuple[str, str]:
    """Return (answer, reason of its end) from context and generated ids; the answer is stripped.

    chatml: cut at the first im_end or im_start; raw: ``<|endoftext|>`` is removed. Only generated ids are
    decoded, so that a query that is not in NFC cuts nothing, and an answer that ends at the length limit
    keeps its last token; the published code errs in both.

    Raises:
        PromptError: an unknown chat format, or an id outside the vocabulary.
    """
    answer = list(tokens[context_length:])
    if _checked_format(chat_format) == "raw":
        text = tokenizer.decode(answer, errors=errors).replace(END_OF_TEXT, "")
        return text.strip(), f"Gen length {len(tokens)}"
    ends = (tokenizer.im_end_id, tokenizer.im_start_id)
    for position, token in enumerate(answer):
        if token in ends:
            reason = f"Gen {tokenizer.decode([token])!r}"
            return tokenizer.decode(answer[:position], errors=errors).strip(), reason
    return tokenizer.decode(answer, errors=errors).strip(), f"Gen length {len(tokens)}"


def turn_ids(message: Message, tokenizer: QwenTokenizer, *, specials: bool = False) -> TurnIds:
    """Return the ids of one turn; ``specials`` lets control tokens in the content count as such.

    Only the published training data preparation encodes contents so; no prompt does.
    """
    # Allowing control tokens costs ten times as much as a short text, so only where there may be one.
    allowed = "all" if specials and "<|" in message.content else ()
    return TurnIds(
        header=_header(message.role, tokenizer),
        body=[*tokenizer.encode(message.content, allowed), tokenizer.im_end_id],
        tail=tokenizer.encode("\n"),
    )


def _header(role: str, tokenizer: QwenTokenizer) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role), *tokenizer.encode("\n")]


def _split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """[leading system messages, turn, turn, ...]."""
    turns: list[list[Message]] = [[]]
    for message in messages:
        if message.role == "system" and len(turns) == 1:
            turns[0].append(message)
        elif message.role == "user" or len(turns) == 1:
            turns.append([message])
        else:
            turns[-1].append(message)
    return turns


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise PromptError("there are no messages to answer")
    for number, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise PromptError(
                f"message {number}: unknown role {message.role!r}; known are {', '.join(get_args(Role))}"
            )
        if message.tool_calls:
            raise PromptError(f"message {number}: tool calls must be turned into ReAct text before rendering")


def _checked_format(chat_format: str) -> str:
    if chat_format not in CHAT_FORMATS:
        raise PromptError(f"unknown chat_format {chat_format!r}; known are {', '.join(CHAT_FORMATS)}")
    return chat_format
