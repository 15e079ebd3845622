"""/v1/models, /health and /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from research.qwen import __version__
from research.qwen.serve.errors import CLOSED_SECONDS, ApiError, JsonResponse
from research.qwen.serve.state import ServerState

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The names the model answers to, and its adapters, whose parent it is."""
    state: ServerState = request.app.state.qwen
    names = state.settings.model_names + state.settings.adapters
    return {"object": "list", "data": [_card(state, name) for name in names]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    state: ServerState = request.app.state.qwen
    if model not in state.settings.model_names + state.settings.adapters:
        raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
    return _card(state, model)


def _card(state: ServerState, name: str) -> dict[str, Any]:
    length = state.engine.lm.max_length if state.phase == "ready" else None
    card = {"id": name, "object": "model", "created": state.settings.created, "owned_by": "qwen-mindspore"}
    adapter = state.adapter_of(name)
    parent = state.model_name if adapter else None
    return {**card, "root": adapter or state.model_name, "parent": parent, "max_model_len": length}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 once the model is loaded and warm, else 503."""
    phase = request.app.state.qwen.phase
    if phase == "ready":
        return JsonResponse({"status": "ok"})
    error = ApiError(503, f"the server is {phase}", code=phase, retry_after=CLOSED_SECONDS)
    return JsonResponse({"status": phase, **error.body()}, 503, headers=error.headers)


@router.get("/version")
async def version() -> dict[str, str]:
    """Version of the package."""
    return {"version": __version__}
