"""The ASGI application: routers and middleware around one ``ServerState``."""

from __future__ import annotations

from fastapi import FastAPI

from research.qwen import __version__
from research.qwen.serve import chat, completions, errors, models, page
from research.qwen.serve.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application of one served model; routes find it as ``request.app.state.qwen``."""
    app = FastAPI(
        title="qwen-mindspore",
        version=__version__,
        docs_url=None,  # these pages load scripts from a CDN
        redoc_url=None,
        root_path=state.settings.root_path,
        default_response_class=errors.JsonResponse,
        responses={"default": {"model": errors.ErrorBody, "description": "What went wrong"}},
        redirect_slashes=False,
    )
    app.state.qwen = state
    for part in (models, chat, completions, page):
        app.include_router(part.router)
    errors.install(app)
    app.add_middleware(errors.Guard)
    return app
