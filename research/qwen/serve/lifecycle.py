"""A server from its start to its end: the model loads while /health already answers, and a signal drains it.

The command blocks the signals before it imports what starts threads, and one thread waits for them: MindSpore puts
a handler of its own in the place of Python's, and that would end the process in the middle of an answer. Handlers are
there all the same, for a process in which some thread was older than the block.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from research.qwen.engine import Engine
from research.qwen.errors import ConfigError, KernelError, RequestError
from research.qwen.scheduler import Scheduler
from research.qwen.serve.app import create_app
from research.qwen.serve.errors import describe
from research.qwen.serve.state import ServerState
from research.qwen.serve.structured import compiler_of

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WATCH_SECONDS = 1.0
FLUSH_SECONDS = 5  # for the last bytes of answers once the scheduler has ended
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that it is they who close them

Load = Callable[[], tuple[Engine, Scheduler]]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. ConfigError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from None


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """Serves one model.

    Args:
        load: makes engine and scheduler; called in a thread of its own.
        ready: called once requests are taken.
    """

    def __init__(self, state: ServerState, load: Load, ready: Callable[[], None] = lambda: None):
        self.state, self.load, self.ready = state, load, ready
        self._scheduler: Scheduler | None = None
        self._loading = threading.Thread(target=self._load, name="qwen-load", daemon=True)
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clean, self._asked_to_end = True, False

    def run(self, listener: socket.socket) -> bool:
        """Serve until a signal comes or loading fails; False if requests had to be cut off.

        Raises:
            QwenError and others: what loading raised.
        """
        config = uvicorn.Config(
            create_app(self.state),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        server = _Server(config)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(self._serve(server, listener))
        if self.state.failure is not None:
            raise self.state.failure
        return self._clean

    @property
    def loading(self) -> bool:
        """Whether the thread that loads the model is at work."""
        return self._loading.is_alive()

    def stop(self) -> None:
        """Drain and end, from any thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._signalled, number)
        threading.Thread(target=self._wait_for_signals, name="qwen-signals", daemon=True).start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        self._loading.start()
        stopped = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(self._watch())
        await asyncio.wait((serving, stopped, watching), return_when=asyncio.FIRST_COMPLETED)
        self.state.begin_drain()
        await asyncio.to_thread(self._drain)
        server.should_exit = True
        await serving
        stopped.cancel()
        watching.cancel()

    async def _watch(self) -> None:
        """Ends when the model has failed at work: a supervisor can only start again what ends."""
        while self._scheduler is None or self._scheduler.state != "failed":
            await asyncio.sleep(WATCH_SECONDS)
        self.state.fail(KernelError("the model has failed; the log says where. Start the server again"))

    def _load(self) -> None:
        try:
            engine, scheduler = self.load()
            self._scheduler = scheduler
            self.state.attach(engine, scheduler)
            scheduler.start()
            self._warm_grammars(engine)
            if not scheduler.wait_ready() and scheduler.state == "failed":
                raise KernelError("the model failed in its first run; the log says where")
        except BaseException as error:
            log.error("loading failed: %s", describe(error))
            self.state.fail(error)
            self.stop()
            return
        if self.state.phase == "ready":
            settle()
            self.ready()

    @staticmethod
    def _warm_grammars(engine: Engine) -> None:
        """Read the vocabulary for structured answers now: the first of them would wait most of a second for it."""
        with contextlib.suppress(RequestError):  # no vocabulary, or no package: such a request says so
            compiler_of(engine).warm()

    def _drain(self) -> None:
        """Let requests finish within the grace time, then end the model thread."""
        if self._scheduler is None:
            return
        started = time.monotonic()
        self._clean = self._scheduler.drain(self.state.settings.grace)
        log.info(
            "drained after %.1f s%s", time.monotonic() - started, "" if self._clean else ", some cut off"
        )
        self._scheduler.close()

    def _wait_for_signals(self) -> None:
        while True:
            self._signalled(signal.sigwait(SIGNALS))

    def _signalled(self, number: int) -> None:
        """The first signal drains, the second ends."""
        name = signal.Signals(number).name
        if self._asked_to_end:
            log.warning("%s again: ending at once", name)
            leave(128 + number)
        self._asked_to_end = True
        log.info("%s: no new requests; running ones have %g s", name, self.state.settings.grace)
        self.stop()


def settle() -> None:
    """Take everything that is alive out of the collector's sight.

    Of 200,000 objects hardly one ever goes, and to look at all of them takes longer than a step of the model.
    """
    gc.collect()
    gc.freeze()


def leave(code: int) -> None:
    """End the process without waiting for any thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
