"""/v1/embeddings: the mean of the last hidden states of a text, normalised to length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import Field, WithJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from research.qwen.engine import Engine
from research.qwen.errors import RequestError
from research.qwen.serve.errors import ApiError, JsonResponse
from research.qwen.serve.logs import note
from research.qwen.serve.protocol import Body
from research.qwen.serve.sampling import refuse
from research.qwen.serve.sse import unless_gone
from research.qwen.serve.state import ServerState

router = APIRouter()

CALL_TOKENS = 512  # of one call of the scheduler: what a client that leaves can still cost


IDS = {"type": "array", "items": {"type": "integer"}}
INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        IDS,
        {"type": "array", "items": IDS},
    ]
}


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
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
        vectors = await unless_gone(request, _embed(state, prompts, state.adapter_of(name)))
    if body.dimensions not in (None, vectors.shape[1]):
        raise ApiError(400, f"dimensions can only be {vectors.shape[1]} here", param="dimensions")
    return await run_in_threadpool(_answer, vectors, body.encoding_format, name, tokens)


def _encode(state: ServerState, given: Any) -> list[list[int]]:
    """Ids of every input. ApiError for an input that is empty, too long, not in the vocabulary, or something else."""
    if isinstance(given, str) or _is_ids(given):
        return [_ids(state, given, "input")]
    if not isinstance(given, list):
        raise refuse("input", "must be a string, token ids, or a list of them")
    if not given:
        raise refuse("input", "is an empty list; give at least one input")
    if len(given) > state.settings.max_inputs:
        raise refuse(
            "input", f"has {len(given)} inputs; at most {state.settings.max_inputs} are taken at once"
        )
    return [_ids(state, item, f"input[{place}]") for place, item in enumerate(given)]


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and type(given[0]) is int


def _ids(state: ServerState, item: Any, where: str) -> list[int]:
    if isinstance(item, str):
        item = state.tokenizer.encode(item)
    if not isinstance(item, list) or not all(type(token) is int for token in item):
        raise refuse(where, "must be a string or a list of token ids")
    if not item:
        raise refuse(where, "is empty; give at least one token")
    size = state.engine.lm.vocab_size
    if min(item) < 0 or max(item) >= size:
        raise refuse(where, f"has ids outside the vocabulary of {size}")
    state.check_context(len(item), 0, param=where)
    return item


async def _embed(state: ServerState, prompts: list[list[int]], adapter: str) -> NDArray[np.float32]:
    """(B, hidden) vectors, a few inputs a call."""
    vectors = []
    for batch in _batches(prompts):

        def work(engine: Engine, batch: list[list[int]] = batch) -> Any:
            return engine.embed_steps(batch, adapter)  # in pieces: running answers go on between them

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


def _answer(vectors: NDArray[np.float32], encoding: str | None, name: str, tokens: int) -> Response:
    if not np.isfinite(vectors).all():
        raise RequestError("the model gives no finite vector for this input")
    data = [
        {"object": "embedding", "index": place, "embedding": _as_json(vector, encoding)}
        for place, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _as_json(vector: NDArray[np.float32], encoding: str | None) -> str | list[float]:
    """The numbers, or their little-endian float32 bytes in base64."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
