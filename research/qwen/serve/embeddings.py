"""/v1/embeddings: the mean of the last hidden states of a text, normalised to length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from research.qwen.engine import Engine
from research.qwen.errors import RequestError
from research.qwen.serve.errors import ApiError, JsonResponse
from research.qwen.serve.logs import note
from research.qwen.serve.state import ServerState

router = APIRouter()

CALL_TOKENS = 512  # of one call of the scheduler; before each the client is asked for


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(description="the model's own number, if given")] = None
    user: str | None = None


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Vectors of texts or of lists of token ids."""
    state: ServerState = request.app.state.qwen
    name = state.check_model(body.model)
    state.check_ready()
    prompts = await run_in_threadpool(_encode, state, body.input)
    tokens = sum(map(len, prompts))
    note(request, prompt_tokens=tokens, inputs=len(prompts))
    with state.embedding_slot():
        vectors = await _embed(request, state, prompts)
    if vectors is None:
        return Response(status_code=499)  # the client has left
    if body.dimensions not in (None, vectors.shape[1]):
        raise ApiError(400, f"dimensions can only be {vectors.shape[1]} here", param="dimensions")
    return await run_in_threadpool(_answer, vectors, body.encoding_format, name, tokens)


def _encode(state: ServerState, given: str | list[Any]) -> list[list[int]]:
    """Ids of every input. RequestError or ApiError for an input that is empty, too long or not in the vocabulary."""
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    inputs: list[Any] = list(given) if several else [given]
    if len(inputs) > state.settings.max_inputs:
        limit = state.settings.max_inputs
        raise ApiError(400, f"{len(inputs)} inputs, at most {limit} go into a request", param="input")
    prompts = []
    for place, item in enumerate(inputs):
        param = f"input[{place}]" if several else "input"
        ids = state.tokenizer.encode(item) if isinstance(item, str) else list(item)
        if not ids:
            raise ApiError(400, f"{param} is empty; give at least one token", param=param)
        size = state.engine.lm.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            raise ApiError(400, f"{param} has ids outside the vocabulary of {size}", param=param)
        state.check_context(len(ids), 0, param=param)
        prompts.append(ids)
    return prompts


async def _embed(
    request: Request, state: ServerState, prompts: list[list[int]]
) -> NDArray[np.float32] | None:
    """(B, hidden) vectors, a few inputs a call; None if the client leaves meanwhile."""
    vectors = []
    for batch in _batches(prompts):
        if await request.is_disconnected():
            return None

        def work(engine: Engine, batch: list[list[int]] = batch) -> Any:
            return engine.embed_steps(batch)  # in pieces: running answers go on between them

        vectors.append(await asyncio.wrap_future(state.scheduler.call(work)))
    return np.concatenate(vectors)


def _batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Consecutive prompts of at most CALL_TOKENS together, or one longer one."""
    batch: list[list[int]] = []
    for ids in prompts:
        if batch and sum(map(len, batch)) + len(ids) > CALL_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _answer(vectors: NDArray[np.float32], encoding: str, name: str, tokens: int) -> Response:
    if not np.isfinite(vectors).all():
        raise RequestError("the model gives no finite vector for this input")
    data = [
        {"object": "embedding", "index": place, "embedding": _as_json(vector, encoding)}
        for place, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _as_json(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    """The numbers, or their little-endian float32 bytes in base64."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
