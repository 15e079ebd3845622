"""Arguments of ``generate`` to what the decoding loop takes: one value, every option known, none swallowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np

from research.qwen.config import suggest
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import PromptError, RequestError

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits")
# Known to GenerationMixin; one value is what we do anyway, any other is refused.
_FIXED = {
    "num_beams": 1,
    "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False,
    "parallel_decoding": False,
}
# In a GenerationConfig without a meaning here.
_IGNORED = ("bos_token_id", "window_size", "level", "guess_set_size")
# What MindFormers' pipeline hands on of its own.
_PIPELINE = frozenset(
    "is_full_config batch_size model_name task save_file audio_processor image_processor".split()
)
_KNOWN = (
    *_SAMPLING,
    *_LENGTHS,
    *_OUTPUTS,
    *_FIXED,
    *_IGNORED,
    "do_sample",
    "eos_token_id",
    "pad_token_id",
    "use_past",
    "stop_words_ids",
)


@dataclass(frozen=True)
class Options:
    """One call of ``generate``, checked; lengths are resolved per prompt by ``for_prompt``."""

    params: SamplingParams
    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int
    as_dict: bool
    scores: bool
    logits: bool
    stop_words: tuple[tuple[int, ...], ...]

    def for_prompt(self, length: int, row: int) -> SamplingParams:
        """Parameters of one row: its own length limit, and a seed of its own so that equal prompts differ.

        Raises RequestError if max_length leaves no room.
        """
        new = self.max_new_tokens
        if new is None and self.max_length is not None:
            new = self.max_length - length
            if new < 1:
                raise RequestError(
                    f"max_length {self.max_length} leaves no room after a prompt of {length} tokens; "
                    "raise it, or use max_new_tokens"
                )
        seed = self.params.seed
        return replace(self.params, max_new_tokens=new, seed=None if seed is None else (seed + row) % 2**64)

    def least_length(self, prompt_length: int) -> int:
        """Tokens, prompt included, before which no end id may come."""
        return max(self.min_length, prompt_length + self.min_new_tokens if self.min_new_tokens else 0)


def read_options(
    defaults: Mapping[str, Any],
    generation_config: Any,
    given: Mapping[str, Any],
    seed: int | None,
    use_past: bool,
    vocab_size: int,
) -> Options:
    """Join the model's defaults (or a GenerationConfig instead of them) with the keywords of a call.

    A keyword of None follows the defaults. Raises RequestError naming an unknown or unsupported option, or a bad value.
    """
    given = {name: value for name, value in given.items() if name not in _PIPELINE}
    for name in given:
        if name not in _KNOWN:
            raise RequestError(f"generate() has no option {name!r}{suggest(str(name), list(_KNOWN))}")
    if given.get("use_past") not in (None, use_past):
        raise RequestError("use_past is a property of the model: set it in the YAML file, not in generate()")
    explicit = {name: value for name, value in given.items() if value is not None}
    if generation_config is not None:
        base = {k: v for k, v in generation_config.to_dict().items() if k in _KNOWN and v is not None}
        if not base.get("eos_token_id"):
            base["eos_token_id"] = defaults.get("eos_token_id", [])
    else:
        base = dict(defaults)
    if "max_length" in explicit and "max_new_tokens" not in explicit:
        base.pop("max_new_tokens", None)
    values = {**base, **explicit}
    for name, only in _FIXED.items():
        if values.get(name, only) != only:
            raise RequestError(f"{name} = {values[name]!r} is not supported, only {only!r}")
    sampling = {name: values[name] for name in _SAMPLING if name in values}
    do_sample = _flag("do_sample", values.get("do_sample", False))
    if not do_sample:
        SamplingParams(**sampling)  # a bad value is an error even where it would have no effect
        sampling["temperature"] = 0.0
    params = SamplingParams(**sampling, seed=seed, max_new_tokens=values.get("max_new_tokens"))
    return Options(
        params=params.answering(),
        eos_ids=_ids("eos_token_id", values.get("eos_token_id", ()), vocab_size),
        pad_id=(_ids("pad_token_id", values.get("pad_token_id", 0), vocab_size) or (0,))[0],
        max_length=_count("max_length", values.get("max_length"), 1),
        max_new_tokens=params.max_new_tokens,
        min_length=_count("min_length", values.get("min_length"), 0) or 0,
        min_new_tokens=_count("min_new_tokens", values.get("min_new_tokens"), 0) or 0,
        as_dict=_flag("return_dict_in_generate", values.get("return_dict_in_generate", False)),
        scores=_flag("output_scores", values.get("output_scores", False)),
        logits=_flag("output_logits", values.get("output_logits", False)),
        stop_words=read_stop_words(values.get("stop_words_ids"), vocab_size),
    )


def read_stop_words(given: Any, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Sequences of ids after which an answer ends; RequestError if they are anything else. The caller's lists are
    copied, never kept."""
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise RequestError(f"stop_words_ids must be a list of lists of token ids, got {given!r}")
    words = []
    for word in given:
        if isinstance(word, str) or not isinstance(word, Iterable):
            raise RequestError(
                f"stop_words_ids must hold lists of token ids, got {word!r}; write [[id], [id, id]]"
            )
        ids = list(word)
        if not ids or not all(isinstance(i, Integral) and 0 <= int(i) < vocab_size for i in ids):
            raise RequestError(
                f"stop_words_ids must hold non-empty lists of ids below {vocab_size}, got {ids!r}"
            )
        words.append(tuple(int(i) for i in ids))
    return tuple(words)


def read_prompts(input_ids: Any, pad_id: int, vocab_size: int, max_length: int) -> list[list[int]]:
    """Rows of ids from a list, a list of lists (ragged or right-padded), an array or a Tensor; pads are cut off.

    The pad id is <|endoftext|> in Qwen: like GenerationMixin, this also cuts such ids that a prompt itself ends with.

    Raises:
        PromptError: an empty row, one of pads only, an id outside the vocabulary, or a row that fills the context.
    """
    if hasattr(input_ids, "asnumpy"):
        input_ids = input_ids.asnumpy()
    if isinstance(input_ids, np.ndarray):
        if input_ids.ndim not in (1, 2) or (input_ids.size and input_ids.dtype.kind not in "iu"):
            raise PromptError(
                f"input_ids must be integers of one or two dimensions, got {input_ids.dtype} {input_ids.shape}"
            )
        input_ids = input_ids.tolist()
    if isinstance(input_ids, str) or not isinstance(input_ids, Sequence):
        raise PromptError("input_ids must be a list of token ids, a list of such lists, an array or a Tensor")
    many = bool(input_ids) and not isinstance(input_ids[0], Integral)
    rows = [_row(row, place) for place, row in enumerate(input_ids if many else [input_ids])]
    for place, row in enumerate(rows):
        where = f"prompt {place}" if len(rows) > 1 else "the prompt"
        if not row:
            raise PromptError(f"{where} is empty; give at least one token")
        bad = next((i for i in row if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise PromptError(f"{where}: token id {bad} is outside the vocabulary of {vocab_size} rows")
        while row and row[-1] == pad_id:
            row.pop()
        if not row:
            raise PromptError(f"{where} holds nothing but the pad id {pad_id}")
        if len(row) >= max_length:
            raise PromptError(
                f"{where} has {len(row)} tokens and leaves no room: the context holds {max_length} "
                "(num_blocks x block_size of the KV cache, or max_position_embedding)"
            )
    return rows


def _row(row: Any, place: int) -> list[int]:
    if hasattr(row, "asnumpy"):
        row = row.asnumpy()
    values = row.tolist() if isinstance(row, np.ndarray) else row
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise PromptError(f"prompt {place} must be a list of token ids, got {type(row).__name__}")
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in values):
        raise PromptError(f"prompt {place}: token ids must be integers")
    return [int(i) for i in values]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _count(name: str, value: Any, low: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise RequestError(f"{name} must be an integer of at least {low}, got {value!r}")
    return int(value)


def _ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    listed = list(value) if isinstance(value, Iterable) else [value]
    for i in listed:
        if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= int(i) < vocab_size:
            raise RequestError(
                f"{name} must hold token ids of the vocabulary of {vocab_size} rows, got {i!r}"
            )
    return tuple(dict.fromkeys(int(i) for i in listed))
