"""What the routes share: settings, the loaded engine with its scheduler, and whether requests are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from research.qwen.decode.params import SamplingParams
from research.qwen.errors import BusyError, ClosedError, RequestError
from research.qwen.messages import Delta
from research.qwen.serve.errors import ApiError
from research.qwen.serve.metrics import Metrics, WatchedTicket
from research.qwen.text.tokenizer import QwenTokenizer

if TYPE_CHECKING:
    from research.qwen.engine import Engine
    from research.qwen.scheduler import Scheduler

Phase = Literal["loading", "ready", "draining", "closed", "failed"]
Deliver = Callable[[Delta | BaseException], None]


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Args:
        model_names: names the model answers to; responses carry the first.
        adapters: names of the engine's adapters, each of them a model of its own for requests.
        any_model: accept other names, too (else they are a 404).
        api_keys: if there are any, every route but /health and the page needs one of them.
        open_metrics: /metrics needs no key.
        check_host: refuse requests to host names that are not this machine's, but for ``allowed_hosts``.
        cors_origins: origins of web pages that may call; none by default.
        root_path: prefix under which a proxy shows the server.
        max_body: bytes of a request body.
        body_seconds: how long a client may take to send it.
        max_inputs: prompts or inputs in one request.
        max_pending_embeddings: embedding requests at work or waiting.
        default_max_tokens: length of a chat answer where the request gives none; None: what the context holds.
        grace: seconds that running requests have to finish when the server stops.
        ping_seconds: silence of a stream after which a comment is sent; 0: never.
    """

    model_names: tuple[str, ...] = ("qwen",)
    adapters: tuple[str, ...] = ()
    any_model: bool = False
    api_keys: tuple[str, ...] = ()
    open_metrics: bool = False
    check_host: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    max_body: int = 10 * 2**20
    body_seconds: float = 60.0
    max_inputs: int = 2048
    max_pending_embeddings: int = 64
    default_max_tokens: int | None = None
    grace: float = 30.0
    ping_seconds: float = 15.0
    created: int = field(default_factory=lambda: int(time.time()))


class ServerState:
    """One served model. ``app.state.qwen`` of the app; usable from any thread.

    Without engine and scheduler it is loading until ``attach`` or ``fail``.
    """

    def __init__(
        self, settings: ServerSettings, engine: Engine | None = None, scheduler: Scheduler | None = None
    ):
        self.settings = settings
        self._engine, self._scheduler = engine, scheduler
        self._failure: BaseException | None = None
        self._draining = False
        self._embeddings = 0
        self.metrics = Metrics(settings.model_names[0], lambda: self._scheduler)

    def attach(self, engine: Engine, scheduler: Scheduler) -> None:
        """The model is loaded; the scheduler may still be warming up."""
        self._engine, self._scheduler = engine, scheduler

    def fail(self, error: BaseException) -> None:
        """The model could not be loaded."""
        self._failure = error

    def begin_drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    @property
    def phase(self) -> Phase:
        """loading, ready, draining, closed or failed."""
        if self._failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        return "loading" if self._scheduler is None else self._scheduler.state

    @property
    def failure(self) -> BaseException | None:
        """Why the model could not be loaded."""
        return self._failure

    @property
    def engine(self) -> Engine:
        """The engine; ClosedError (503) while there is none."""
        if self._engine is None:
            raise ClosedError("the model is still loading; try again a little later")
        return self._engine

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of a server that is ready; ClosedError (503) before and after."""
        self.check_ready()
        assert self._scheduler is not None
        return self._scheduler

    @property
    def tokenizer(self) -> QwenTokenizer:
        """The vocabulary; RequestError (400) for a model without one."""
        if self.engine.tokenizer is None:
            raise RequestError("this model was loaded without a vocabulary: send token ids")
        return self.engine.tokenizer

    @property
    def model_name(self) -> str:
        """The name that responses carry."""
        return self.settings.model_names[0]

    def check_ready(self) -> None:
        """ClosedError (503) unless requests are taken."""
        reasons = {
            "loading": "the model is still loading; try again a little later",
            "draining": "the server is shutting down",
            "closed": "the server is shut down",
            "failed": "the model has failed; the server must be started again",
        }
        if self.phase != "ready":
            raise ClosedError(reasons[self.phase])

    def check_model(self, name: str | None) -> str:
        """The name of the model for responses; ApiError 404 for one that is not served. None is the default."""
        if name in self.settings.adapters:
            return name
        if name in (None, "") or self.settings.any_model:
            return self.model_name
        if name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names + self.settings.adapters)
            raise ApiError(
                404, f"there is no such model here; served: {served}", param="model", code="model_not_found"
            )
        return name

    def adapter_of(self, model: str) -> str:
        """The adapter behind a name that ``check_model`` gave; empty for the base model."""
        return model if model in self.settings.adapters else ""

    def check_context(
        self, prompt_tokens: int, new_tokens: int | None = None, *, param: str = "prompt"
    ) -> int:
        """Room for new tokens behind the prompt; ApiError 400 with the numbers if prompt and wish do not fit."""
        room = self.engine.lm.max_length - prompt_tokens
        if room < max(new_tokens if new_tokens is not None else 1, 0):
            wish = f" and {new_tokens} new ones were asked for" if new_tokens else ""
            raise ApiError(
                400,
                f"the context holds {self.engine.lm.max_length} tokens; "
                f"the prompt has {prompt_tokens}{wish}: shorten it or ask for fewer",
                param=param,
                code="context_length_exceeded",
            )
        return room

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, deliver: Deliver, **options: Any
    ) -> WatchedTicket:
        """``Scheduler.submit`` with the metrics of the request; ``options`` are processors, cache_salt and adapter.

        ``deliver`` is called on the model thread. Raises what the scheduler raises, ClosedError if not ready.
        """
        return self.metrics.submit(self.scheduler, prompt_ids, params, deliver, options)

    @contextmanager
    def embedding_slot(self) -> Iterator[None]:
        """A place among the embedding requests at work; BusyError (429) if there are too many. Event loop only."""
        if self._embeddings >= self.settings.max_pending_embeddings:
            raise BusyError("too many embedding requests at once; try again a little later")
        self._embeddings += 1
        try:
            yield
        finally:
            self._embeddings -= 1
