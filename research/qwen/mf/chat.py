"""``response, history = chat(model, tokenizer, query, history)``: the published chat interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, runtime_checkable

from research.qwen.config import suggest
from research.qwen.decode.loop import LanguageModel
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError
from research.qwen.messages import Delta
from research.qwen.mf.model import QwenForCausalLM
from research.qwen.mf.options import read_stop_words
from research.qwen.mf.tokenizer import QwenTokenizer
from research.qwen.text.chatml import DEFAULT_SYSTEM, decode_response, make_context, stop_ids
from research.qwen.text.tokenizer import QwenTokenizer as PureTokenizer

History = list[tuple[str, str]]


@runtime_checkable
class EngineLike(Protocol):
    """What is needed of an Engine (research.qwen.engine), which stands beside this surface and is not imported."""

    lm: LanguageModel
    eos_ids: tuple[int, ...]

    def default_params(self, **changes: Any) -> SamplingParams:
        """The model's own generation defaults, with some fields changed."""

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of the answer to a prompt of ids."""


def chat(
    model: QwenForCausalLM | EngineLike,
    tokenizer: QwenTokenizer | PureTokenizer,
    query: str,
    history: Iterable[Sequence[str]] | None = None,
    system: str = DEFAULT_SYSTEM,
    append_history: bool = True,
    stop_words_ids: Sequence[Sequence[int]] | None = None,
    chat_format: str = "chatml",
    max_window_size: int = 6144,
    streamer: Any = None,
    **options: Any,
) -> tuple[str, History]:
    """Answer a query; returns the answer and a new history (what is passed in stays as it is).

    Unlike the published code, an answer that ends at the length limit keeps its last token, and a query that is not
    in NFC costs the answer no characters.

    Args:
        model: QwenForCausalLM or Engine.
        history: pairs of earlier query and answer; the oldest that do not fit are left out of the prompt.
        append_history: False returns the history without this turn.
        stop_words_ids: sequences of ids after which the answer ends; they stay in it. End ids of the format are known.
        chat_format: chatml, or raw for a base model: the bare query is continued.
        max_window_size: tokens of system text and history together.
        streamer: gets the ids as ``QwenForCausalLM.generate`` says (an Engine streams by ``chat_stream``).
        options: do_sample, temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens, max_length.
    Raises:
        PromptError, RequestError: an unknown option too.
    """
    pure = _pure(tokenizer)
    pairs: History = [_pair(item) for item in history or ()]
    _, ids = make_context(pure, query, pairs, system, max_window_size, chat_format)
    ends = stop_ids(pure, chat_format)
    if not isinstance(model, QwenForCausalLM):
        if not isinstance(model, EngineLike):
            raise RequestError(f"model must be a QwenForCausalLM or an Engine, got {type(model).__name__}")
        if streamer is not None:
            raise RequestError("an Engine takes no streamer; use its chat_stream")
        tokens = _by_engine(model, ids, ends, stop_words_ids, options)
    else:
        tokens = _by_model(model, ids, ends, stop_words_ids, streamer, options)
    response, _ = decode_response(tokens, len(ids), pure, chat_format)
    return response, [*pairs, (query, response)] if append_history else pairs


def _by_model(
    model: QwenForCausalLM,
    ids: list[int],
    ends: Sequence[int],
    stop_words: Sequence[Sequence[int]] | None,
    streamer: Any,
    options: dict[str, Any],
) -> list[int]:
    """Prompt and answer ids from the model."""
    # A raw prompt may end with the pad id and mean it: name another one.
    settings = {"pad_token_id": 1 if ids[-1:] == [0] else 0, "stop_words_ids": stop_words, **options}
    settings.setdefault("eos_token_id", sorted({*ends, *model.defaults["eos_token_id"]}))
    tokens = [int(i) for i in model.generate(ids, streamer=streamer, **settings)[0]]
    return _without_end(tokens, len(ids), settings["eos_token_id"])


def _by_engine(
    engine: EngineLike,
    ids: list[int],
    ends: Sequence[int],
    stop_words: Sequence[Sequence[int]] | None,
    options: dict[str, Any],
) -> list[int]:
    """Prompt and answer ids from an engine; closing its stream frees the request."""
    words = read_stop_words(stop_words, engine.lm.vocab_size)
    params = _engine_params(engine, len(ids), options)
    params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
    tokens = list(ids)
    stream = engine.stream(ids, params)
    try:
        for delta in stream:
            tokens += delta.ids
            if any(tuple(tokens[max(len(tokens) - len(word), len(ids)) :]) == word for word in words):
                break
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()
    return _without_end(tokens, len(ids), (*ends, *engine.eos_ids))


def _without_end(tokens: list[int], prompt_length: int, ends: int | Sequence[int]) -> list[int]:
    """The id that ended the answer is no part of it: <|endoftext|> would be shown by name."""
    known = (ends,) if isinstance(ends, int) else ends
    return tokens[:-1] if len(tokens) > prompt_length and tokens[-1] in known else tokens


def _engine_params(engine: EngineLike, prompt_length: int, options: dict[str, Any]) -> SamplingParams:
    """The engine's own parameters with the options of this call."""
    known = [field.name for field in fields(SamplingParams) if field.name not in ("n", "logprobs")]
    values = {name: value for name, value in options.items() if value is not None}
    do_sample = values.pop("do_sample", None)
    total = values.pop("max_length", None)
    for name in values:
        if name not in known:
            names = [*known, "do_sample", "max_length"]
            raise RequestError(f"chat() has no option {name!r}{suggest(name, names)}")
    if total is not None and "max_new_tokens" not in values:
        if total <= prompt_length:
            raise RequestError(f"max_length {total} leaves no room after a prompt of {prompt_length} tokens")
        values["max_new_tokens"] = total - prompt_length
    params = engine.default_params(**values).answering()
    if do_sample is False:
        return replace(params, temperature=0.0)
    if do_sample is True and params.temperature == 0.0 and "temperature" not in values:
        return replace(params, temperature=1.0)
    return params


def _pure(tokenizer: Any) -> PureTokenizer:
    if isinstance(tokenizer, PureTokenizer):
        return tokenizer
    if isinstance(tokenizer, QwenTokenizer):
        return tokenizer.pure
    raise RequestError(f"tokenizer must be a QwenTokenizer, got {type(tokenizer).__name__}")


def _pair(item: Sequence[str]) -> tuple[str, str]:
    if isinstance(item, str) or len(item) != 2:
        raise RequestError(f"history holds pairs of query and answer, got {item!r}")
    return item[0], item[1]
