"""POST /v1/completions: texts and token ids continued, echoed and scored, streamed or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from research.qwen import __version__
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import PromptError
from research.qwen.serve.answer import Answers, Ask, StreamUsage, truncated, usage_body
from research.qwen.serve.completion_choice import CompletionChoice, CompletionOptions, best, choice_of
from research.qwen.serve.errors import ApiError
from research.qwen.serve.logprobs import TokenNames
from research.qwen.serve.protocol import CompletionRequest
from research.qwen.serve.sampling import refuse, sampling_params
from research.qwen.serve.sse import DONE, RESPONSES, event, respond
from research.qwen.serve.state import ServerState
from research.qwen.serve.structured import constraint_of

router = APIRouter()
DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class CompletionJob:
    """A checked request; choice number ``prompt * n + choice`` of the answer belongs to prompt ``prompt``."""

    asks: list[Ask]
    head: dict[str, Any]
    options: CompletionOptions
    n: int  # choices that are returned for each prompt; the scheduler is asked for params.n
    usage: StreamUsage

    def make_choices(self) -> list[list[CompletionChoice]]:
        """A writer for each choice of each prompt."""
        return [
            [CompletionChoice(self.options, ask.prompt_ids) for _ in range(ask.params.n)] for ask in self.asks
        ]


@router.post("/v1/completions", response_model=None, responses=RESPONSES)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one or several prompts."""
    state: ServerState = request.app.state.qwen
    model = state.check_model(body.model)
    state.check_ready()
    job = await run_in_threadpool(prepare, state, body, model)
    answers = Answers(state, job.asks)
    form = partial(_events if body.stream else _whole, job, answers)
    return await respond(request, form(), partial(answers.end, request), state.settings.ping_seconds)


# ---- before ----


def prepare(state: ServerState, body: CompletionRequest, model: str) -> CompletionJob:
    """Check the request and encode its prompts; runs beside the event loop.

    Raises:
        QwenError, ApiError: what is wrong with it.
    """
    usage = StreamUsage.of(body)
    n = _check(body)
    prompts = [
        truncated(ids, body.truncate_prompt_tokens, state.engine.lm.max_length)
        for ids in _prompts(state, body.prompt)
    ]
    for ids in prompts:  # 16 tokens that nobody asked for may be cut by the context
        state.check_context(len(ids), body.max_tokens)
    ranked = body.best_of is not None and body.best_of > n
    logprobs = body.logprobs if body.logprobs is not None else (0 if ranked else None)
    echoed = body.logprobs if body.echo else None
    params = sampling_params(
        body,
        state.engine,
        max_new_tokens=body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS,
        n=max(n, body.best_of or 0),
        logprobs=logprobs,
        prompt_logprobs=_most(body.prompt_logprobs, echoed),
    )
    _check_prompts(state, prompts, params)
    tokenizer = state.engine.tokenizer
    options = CompletionOptions(
        tokenizer=tokenizer,
        names=TokenNames(tokenizer, bool(body.return_tokens_as_token_ids)),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        echo=bool(body.echo),
        token_ids=bool(body.return_token_ids),
    )
    form = constraint_of(state.engine, body)
    adapter = state.adapter_of(model)
    asks = [Ask(ids, params, form, body.cache_salt or "", adapter) for ids in prompts]
    return CompletionJob(asks, _head(model, body.request_id), options, n, usage)


def _check_prompts(state: ServerState, prompts: list[list[int]], params: SamplingParams) -> None:
    """All of them before any runs."""
    for ids in prompts:
        try:
            state.engine.requests.check(ids, params)
        except PromptError as error:
            raise ApiError(400, str(error), param="prompt") from error


def _check(body: CompletionRequest) -> int:
    """The number of choices per prompt; ApiError for what is not supported."""
    if body.suffix:
        raise refuse("suffix", "is not supported: these models were not trained to fill in")
    n = body.n if body.n is not None else 1
    if body.best_of is not None:
        if body.best_of < n:
            raise refuse("best_of", f"must be at least n ({n}), got {body.best_of}")
        if body.stream and body.best_of > n:
            raise refuse("best_of", "is not available in a stream: the best is known at the end only")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise refuse("logprobs", f"must be from 0 to {MAX_LOGPROBS}, got {body.logprobs}")
    return n


def _most(*wishes: int | None) -> int | None:
    given = [wish for wish in wishes if wish is not None]
    return max(given) if given else None


def _prompts(state: ServerState, prompt: Any) -> list[list[int]]:
    """Token ids of every prompt. No prompt, or an empty one, is the start of a document."""
    if _is_ids(prompt):
        return [_ids(prompt, "prompt")]
    if prompt is None or isinstance(prompt, str):
        return [_encode(state, prompt or "")]
    if not isinstance(prompt, list):
        raise refuse(
            "prompt", "must be a string, a list of strings, token ids, or a list of lists of token ids"
        )
    if not prompt:
        raise refuse("prompt", "is an empty list; give at least one prompt")
    if len(prompt) > state.settings.max_inputs:
        raise refuse(
            "prompt", f"has {len(prompt)} prompts; at most {state.settings.max_inputs} are taken at once"
        )
    return [
        _encode(state, item) if isinstance(item, str) else _ids(item, f"prompt[{place}]")
        for place, item in enumerate(prompt)
    ]


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _encode(state: ServerState, text: str) -> list[int]:
    """Ids of a text, in which the names of control tokens are text."""
    return state.tokenizer.encode(text) or [state.tokenizer.eod_id]


def _ids(item: Any, where: str) -> list[int]:
    if not isinstance(item, list) or not all(type(token) is int for token in item):
        raise refuse(where, "must be a string or a list of token ids")
    if not item:
        raise refuse(where, "is empty; give at least one token")
    return item


def _head(model: str, request_id: str | None) -> dict[str, Any]:
    return {
        "id": f"cmpl-{request_id or uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"qwen-mindspore-{__version__}",
    }


# ---- after ----


async def _whole(job: CompletionJob, answers: Answers) -> dict[str, Any]:
    writers = job.make_choices()
    async for prompt, delta in answers:
        for writer in writers[prompt]:
            writer.take_prompt(delta)
        writers[prompt][delta.index].take(delta)
    kept = [choice for listed in writers for choice in best(listed, job.n)]
    choices = [choice_of(index, writer.parts()) for index, writer in enumerate(kept)]
    return {**job.head, "choices": choices, "usage": usage_body(answers.usage)}


async def _events(job: CompletionJob, answers: Answers) -> AsyncIterator[bytes]:
    writers = job.make_choices()
    async for prompt, delta in answers:
        for writer in writers[prompt]:
            writer.take_prompt(delta)
        writers[prompt][delta.index].take(delta)
        for choice, writer in enumerate(writers[prompt]):
            for part in writer.parts():
                index = prompt * job.n + choice
                usage = job.usage.in_chunk(answers.usage)
                yield event({**job.head, "choices": [choice_of(index, [part])], **usage})
    if job.usage.last:
        yield event({**job.head, "choices": [], "usage": usage_body(answers.usage)})
    yield DONE
