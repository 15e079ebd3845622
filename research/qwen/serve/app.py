"""The ASGI application: routers and middleware around one ``ServerState``."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from research.qwen import __version__
from research.qwen.serve import chat, completions, embeddings, errors, metrics, models, page, tokens
from research.qwen.serve.auth import HostCheck, KeyCheck
from research.qwen.serve.limits import BodyLimit
from research.qwen.serve.logs import RequestLog
from research.qwen.serve.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application of one served model; routes find its state as ``request.app.state.qwen``."""
    app = FastAPI(
        title="qwen-mindspore",
        version=__version__,
        docs_url=None,  # these pages load scripts from a CDN
        redoc_url=None,
        default_response_class=errors.JsonResponse,
        responses={"default": {"model": errors.ErrorBody, "description": "What went wrong"}},
        redirect_slashes=False,
    )
    app.state.qwen = state
    for part in (models, chat, completions, embeddings, tokens, metrics, page):
        app.include_router(part.router)
    errors.install(app)
    _add_middleware(app, state)
    return app


def _add_middleware(app: FastAPI, state: ServerState) -> None:
    """What is added last sees a request first. Plain ASGI classes only: others hold streams back."""
    settings, root = state.settings, state.settings.root_path.rstrip("/")
    app.add_middleware(BodyLimit, max_body=settings.max_body, seconds=settings.body_seconds)
    app.add_middleware(
        KeyCheck,
        keys=settings.api_keys,
        open_metrics=settings.open_metrics,
        root_path=root,
    )
    if settings.check_host:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts)
    app.add_middleware(errors.Guard)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, observe=state.metrics.http)
    if root:
        app.add_middleware(RootPath, root_path=root)


class RootPath:
    """ASGI: puts the server under a prefix, whether the proxy in front of it cuts the prefix off or not."""

    def __init__(self, app: ASGIApp, root_path: str):
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            path = str(scope["path"])
            inside = path == self.root_path or path.startswith(self.root_path + "/")
            scope = {**scope, "root_path": self.root_path, "path": path if inside else self.root_path + path}
        await self.app(scope, receive, send)
