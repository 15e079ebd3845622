"""POST /v1/chat/completions: OpenAI's protocol with tools, structured output and logprobs, streamed or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from research.qwen import __version__
from research.qwen.messages import Delta, Usage
from research.qwen.serve.answer import Answers, Ask, StreamUsage, truncated, usage_body
from research.qwen.serve.chat_choice import (
    ChatChoice,
    ChoiceOptions,
    Piece,
    logprobs_of,
    message_of,
)
from research.qwen.serve.chat_prompt import ChatPrompt, chat_prompt
from research.qwen.serve.logprobs import ShownTokens, TokenNames, prompt_entries
from research.qwen.serve.protocol import ChatRequest
from research.qwen.serve.sampling import refuse, sampling_params
from research.qwen.serve.sse import DONE, RESPONSES, event, respond
from research.qwen.serve.state import ServerState

router = APIRouter()
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class ChatJob:
    """A checked request: what the scheduler is asked, and how the answer is written."""

    ask: Ask
    head: dict[str, Any]  # what every chunk begins with
    choices: Callable[[], ChatChoice]
    usage: StreamUsage
    prompt_ids: list[int] | None = None
    names: TokenNames | None = None

    def make_choices(self) -> list[ChatChoice]:
        """A writer for each choice."""
        return [self.choices() for _ in range(self.ask.params.n)]


@router.post("/v1/chat/completions", response_model=None, responses=RESPONSES)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    state: ServerState = request.app.state.qwen
    model = state.check_model(body.model)
    state.check_ready()
    job = await run_in_threadpool(prepare, state, body, model)
    answers = Answers(state, [job.ask])
    form = partial(_events if body.stream else _whole, job, answers)
    return await respond(request, form(), partial(answers.end, request), state.settings.ping_seconds)


# ---- before ----


def prepare(state: ServerState, body: ChatRequest, model: str) -> ChatJob:
    """Check the request and build its prompt; runs beside the event loop.

    Raises:
        QwenError, ApiError: what is wrong with it.
    """
    _check(body)
    usage = StreamUsage.of(body)
    prompt = chat_prompt(state, body)
    limit = state.engine.lm.max_length
    ids = truncated(prompt.ids, body.truncate_prompt_tokens, limit)
    params = sampling_params(
        body,
        state.engine,
        max_new_tokens=_length(state, body, ids),
        stop=prompt.stop,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    return ChatJob(
        ask=Ask(ids, params, prompt.processors, body.cache_salt or "", state.adapter_of(model)),
        head=_head(kind, model, body.request_id),
        choices=_choice_maker(state, body, prompt),
        usage=usage,
        prompt_ids=ids if body.return_token_ids else None,
        names=_names(state, body),
    )


def _length(state: ServerState, body: ChatRequest, ids: list[int]) -> int | None:
    """How many tokens the answer may have; None: what the context holds. Refuses what does not fit."""
    wish = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    room = state.check_context(len(ids), wish, param="messages")
    default = state.settings.default_max_tokens
    return wish if wish is not None or default is None else min(default, room)


def _check(body: ChatRequest) -> None:
    if body.audio is not None or any(kind != "text" for kind in body.modalities or ()):
        raise refuse("audio" if body.audio is not None else "modalities", "these models write text only")
    if body.top_logprobs is not None:
        if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
            raise refuse("top_logprobs", f"must be from 0 to {MAX_TOP_LOGPROBS}, got {body.top_logprobs}")
        if not body.logprobs and body.top_logprobs > 0:
            raise refuse("top_logprobs", "is only allowed when logprobs is true")
    if body.stream and body.prompt_logprobs is not None:
        raise refuse("prompt_logprobs", "is not available in a stream")


def _names(state: ServerState, body: ChatRequest) -> TokenNames:
    return TokenNames(state.tokenizer, bool(body.return_tokens_as_token_ids))


def _choice_maker(state: ServerState, body: ChatRequest, prompt: ChatPrompt) -> Callable[[], ChatChoice]:
    tokenizer, skip = state.tokenizer, body.skip_special_tokens is not False
    options = ChoiceOptions(
        names=_names(state, body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        token_ids=bool(body.return_token_ids),
        legacy_functions=bool(body.functions),
        echo=prompt.echo,
    )
    return lambda: ChatChoice(options, ShownTokens(tokenizer, skip), prompt.parser())


def _head(kind: str, model: str, request_id: str | None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{request_id or uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"qwen-mindspore-{__version__}",
    }


# ---- after ----


async def _whole(job: ChatJob, answers: Answers) -> dict[str, Any]:
    writers = job.make_choices()
    pieces: list[list[Piece]] = [[] for _ in writers]
    extra: dict[str, Any] = {}
    async for _, delta in answers:
        if delta.prompt_logprobs and job.names is not None:
            k = job.ask.params.prompt_logprobs or 0
            listed = prompt_entries(job.ask.prompt_ids, delta.prompt_logprobs, job.names, k)
            extra["prompt_logprobs"] = listed
        pieces[delta.index] += writers[delta.index].add(delta)
    if job.prompt_ids is not None:
        extra["prompt_token_ids"] = job.prompt_ids
    wants_logprobs = job.ask.params.logprobs is not None
    choices = [_choice(index, listed, wants_logprobs) for index, listed in enumerate(pieces)]
    return {**job.head, "choices": choices, "usage": usage_body(answers.usage), **extra}


def _choice(index: int, pieces: list[Piece], wants_logprobs: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "message": message_of(pieces),
        "logprobs": logprobs_of(pieces) if wants_logprobs else None,
        "finish_reason": pieces[-1].finish_reason,
    }
    if pieces[-1].token_ids is not None:
        choice["token_ids"] = [token for piece in pieces for token in piece.token_ids or ()]
    return choice


async def _events(job: ChatJob, answers: Answers) -> AsyncIterator[bytes]:
    writers = job.make_choices()
    first = True
    async for _, delta in answers:
        for piece in writers[delta.index].add(delta):
            chunk = _chunk(job, delta, piece, answers.usage)
            if first and job.prompt_ids is not None:
                chunk["prompt_token_ids"] = job.prompt_ids
            first = False
            yield event(chunk)
    if job.usage.last:
        yield event({**job.head, "choices": [], "usage": usage_body(answers.usage)})
    yield DONE


def _chunk(job: ChatJob, delta: Delta, piece: Piece, usage: Usage) -> dict[str, Any]:
    choice = {
        "index": delta.index,
        "delta": piece.delta,
        "logprobs": piece.logprobs,
        "finish_reason": piece.finish_reason,
    }
    if piece.token_ids is not None:
        choice["token_ids"] = piece.token_ids
    return {**job.head, "choices": [choice], **job.usage.in_chunk(usage)}
