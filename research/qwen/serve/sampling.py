"""From the fields of a request to ``SamplingParams``: the checkpoint's own defaults where the request is silent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.errors import RequestError
from research.qwen.serve.errors import ApiError
from research.qwen.serve.protocol import SamplingFields
from research.qwen.text.tokenizer import QwenTokenizer

GREEDY_BELOW = 0.01  # as the published server: so small a temperature asks for the most likely token
WIRE_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "bad_words_ids": "bad_words"}
SAME_NAMES = (
    "temperature top_p top_k min_p n seed presence_penalty frequency_penalty repetition_penalty stop_token_ids "
    "logit_bias ignore_eos include_stop_str_in_output skip_special_tokens allowed_token_ids prompt_logprobs"
).split()


def refuse(param: str, what: str) -> ApiError:
    """The 400 of a field that is wrong or asks for what this server cannot do."""
    return ApiError(400, f"{param}: {what}", param=param)


def sampling_params(request: SamplingFields, engine: Engine, **own: Any) -> SamplingParams:
    """The request's values over the checkpoint's defaults; ``own`` are fields that the route decides.

    Raises:
        ApiError: 400 that names the field.
    """
    if request.use_beam_search:
        raise refuse("use_beam_search", "beam search is not supported")
    values: dict[str, Any] = {name: getattr(request, name) for name in SAME_NAMES}
    values |= {"min_new_tokens": request.min_tokens, "stop": stop_texts(request.stop)}
    values = {name: value for name, value in (values | own).items() if value is not None}
    _normalise(values)
    if request.bad_words:
        values["bad_words_ids"] = _bad_words(request.bad_words, engine.tokenizer)
    # None asks for all the context holds, while the checkpoint's default would be some number.
    values.setdefault("max_new_tokens", None)
    try:
        params = engine.default_params(**values)
        params.check_vocabulary(engine.lm.vocab_size)
    except RequestError as error:
        raise _named(error) from error
    return params


def _normalise(values: dict[str, Any]) -> None:
    """What other servers take and ``SamplingParams`` does not: 0 and -1 as names for greedy and off."""
    if 0 <= values.get("temperature", 1.0) < GREEDY_BELOW:
        values["temperature"] = 0.0
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if values.get("top_p") == 0:
        values["top_p"], values["top_k"] = 1.0, 1


def stop_texts(stop: Any) -> tuple[str, ...] | None:
    """``stop`` as texts: a string, a list of them, or None."""
    if stop is None:
        return None
    listed = [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise refuse("stop", "must be a string or a list of strings")
    if not all(listed):
        raise refuse("stop", "must not hold an empty string")
    return tuple(listed)


def _bad_words(words: Sequence[str], tokenizer: QwenTokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Ids of each word as it comes at the start of a line and behind a blank."""
    if tokenizer is None:
        raise refuse("bad_words", "needs a vocabulary, and this model was loaded without one")
    if not all(words):
        raise refuse("bad_words", "must not hold an empty string")
    forms = (form for word in words for form in (word, " " + word.lstrip()))
    return tuple(dict.fromkeys(tuple(tokenizer.encode(form)) for form in forms))


def _named(error: RequestError) -> ApiError:
    """The same complaint with the name that the field has on the wire."""
    message = str(error)
    for ours, theirs in WIRE_NAMES.items():
        message = message.replace(ours, theirs)
    first = re.match(r"\w+", message)
    known = first is not None and first.group() in SamplingFields.model_fields
    return ApiError(400, message, param=first.group() if known and first else None)
