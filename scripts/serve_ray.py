"""Several copies of the server behind one address, by Ray Serve: ``serve_ray.py MODEL --replicas 2``.

Each replica is an actor with its own device, model and scheduler, and answers through the very app of ``cli serve``.
In front of them a small actor relays requests: one whose replica dies before the first byte of the answer goes to
another replica (nothing was said yet, so nothing is said twice); a stream that had begun ends with an error event.
Ray starts dead replicas again. Needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a file
    sys.path.insert(0, str(ROOT))

from research.qwen.cli import serve as serve_command  # noqa: E402
from research.qwen.cli.common import quieten  # noqa: E402
from research.qwen.errors import ClosedError, QwenError, RequestError  # noqa: E402

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Scope

    from research.qwen.serve.state import ServerSettings

RETRIES = 2
LEAVE_SECONDS = 5.0  # how long an app may take to notice that its client has left
SCOPE = (
    "type",
    "http_version",
    "method",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "scheme",
    "client",
    "server",
)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``cli serve`` and those of the replicas."""
    parser = serve_command.build_parser()
    parser.prog = "serve_ray.py"
    parser.description = "Serve several copies of a model behind one address, by Ray Serve."
    group = parser.add_argument_group("replicas")
    group.add_argument(
        "--replicas", type=int, default=2, metavar="N", help="copies of the model (default: 2)"
    )
    group.add_argument(
        "--cpus",
        type=float,
        default=1.0,
        metavar="N",
        help="cores Ray reserves for each; give --threads, too",
    )
    group.add_argument("--npus", type=float, default=0.0, metavar="N", help="Ascend cards of each (not run)")
    group.add_argument(
        "--ray-address", metavar="HOST:PORT", help="a running Ray cluster (default: start one)"
    )
    return parser


class Replica:
    """One copy of the model; Ray makes one such actor per device."""

    def __init__(self, args: argparse.Namespace, settings: ServerSettings):
        from research.qwen.serve import logs
        from research.qwen.serve.app import create_app
        from research.qwen.serve.state import ServerState

        logs.configure("debug" if args.verbose else args.log_level)
        engine, self.scheduler = serve_command.load(args)
        self.scheduler.start()
        self.app = create_app(ServerState(settings, engine, self.scheduler))
        self.scheduler.wait_ready()  # Ray sends requests as soon as this returns: warm by then

    def check_health(self) -> None:
        """Ray asks regularly and starts a replica that raises again."""
        if self.scheduler.state == "failed":
            raise RuntimeError("the model of this replica has failed")

    def pid(self) -> int:
        """The process of this replica."""
        return os.getpid()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """What the app sends for a request; closing or cancelling this cancels the request."""
        async for message in run_app(self.app, scope, body):
            yield message

    def __del__(self) -> None:
        if scheduler := getattr(self, "scheduler", None):
            scheduler.close()


async def run_app(app: ASGIApp, scope: Scope, body: bytes) -> AsyncIterator[Message]:
    """Run an ASGI app on one request and give what it sends, as it sends it.

    Closing the iterator is the client leaving.
    """
    left = asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app({**scope, "asgi": {"version": "3.0"}}, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
        task.result()
    finally:
        left.set()
        if not task.done():
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, task.cancel)


class Front:
    """What clients talk to: relays each request to a replica that lives.

    Args:
        call: gives the messages of a replica for (scope, body), with a method ``cancel``.
        deaths: the exceptions that say that the replica has died, or that the call was cancelled.
    """

    def __init__(
        self, call: Callable[[Scope, bytes], Any], deaths: tuple[type[BaseException], ...], max_body: int
    ):
        self.call, self.deaths, self.max_body = call, deaths, max_body
        self.active: set[Any] = set()
        self.draining = False

    async def handle(self, request: Request) -> Response:
        """The response of a replica, streamed; 503 if replica after replica dies over the request."""
        from research.qwen.serve.errors import ApiError, error_response

        try:
            body = await read_body(request, self.max_body)
        except ApiError as error:
            return error_response(error)
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        for _ in range(1 + RETRIES):
            if self.draining:
                break
            response = await self.attempt(scope, body)
            if response is not None:
                return response
        return error_response(ApiError(503, self.reason(), code="unavailable", retry_after=1))

    async def attempt(self, scope: Scope, body: bytes) -> Response | None:
        """The response of one replica; None if it died before it said anything."""
        from starlette.responses import StreamingResponse

        messages = self.call(scope, body)
        self.active.add(messages)
        try:
            head = await anext(messages)
        except self.deaths:
            self.active.discard(messages)
            return None
        except BaseException:  # the client has left
            self.active.discard(messages)
            messages.cancel()
            raise
        headers = head.get("headers") or []
        response = StreamingResponse(self.pieces(messages, headers), status_code=head["status"])
        # Ray gives the request its x-request-id, if the client did not, and repeats it in the response itself.
        response.raw_headers = [(name, value) for name, value in headers if name != b"x-request-id"]
        return response

    async def pieces(self, messages: Any, headers: list[tuple[bytes, bytes]]) -> AsyncIterator[bytes]:
        """The body; a stream of events that breaks off gets an error event, anything else a closed connection."""
        ended = False
        try:
            async for message in messages:
                if message.get("body"):
                    yield message["body"]
                if not message.get("more_body"):
                    ended = True
                    return
        except self.deaths:
            ended = True
            if not is_event_stream(headers):
                raise
            yield error_event(self.reason())
        finally:
            self.active.discard(messages)
            if not ended:
                messages.cancel()  # the client has left

    async def drain(self, grace: float) -> int:
        """Take no new requests and let the others finish; how many were cut off after ``grace`` seconds."""
        self.draining = True
        await self.wait_idle(grace)
        late = list(self.active)
        for messages in late:
            messages.cancel()
        await self.wait_idle(LEAVE_SECONDS)
        return len(late)

    async def wait_idle(self, seconds: float) -> None:
        """Wait until nothing is relayed, at most so long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.active and loop.time() < end:
            await asyncio.sleep(0.05)

    def reason(self) -> str:
        """Why a request was not answered, or not to its end."""
        return STOPPING if self.draining else DIED


DIED = "the replica that was to answer has died; try again"
STOPPING = "the server is shutting down"


def is_event_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the response is a stream of server-sent events."""
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def error_event(message: str) -> bytes:
    """The last event of a stream that breaks off."""
    from research.qwen.serve.errors import ApiError, json_bytes

    return b"data: " + json_bytes(ApiError(503, message, code="unavailable").body()) + b"\n\n"


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request; ApiError 413 as soon as it is longer than ``limit`` bytes."""
    from research.qwen.serve.errors import ApiError

    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise ApiError(413, f"the request body is larger than {limit} bytes")
    return bytes(body)


def application(args: argparse.Namespace, settings: ServerSettings) -> Any:
    """The Ray Serve application: one front, ``args.replicas`` replicas."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RequestCancelledError

    class RayFront:
        def __init__(self, replicas: Any):
            streaming = replicas.options(stream=True)
            deaths = (RayActorError, RequestCancelledError)
            self.front = Front(streaming.answer.remote, deaths, settings.max_body)

        async def __call__(self, request: Request) -> Response:
            return await self.front.handle(request)

        async def drain(self, grace: float) -> int:
            return await self.front.drain(grace)

    # The queue with a limit is the one in the scheduler of a replica; Ray must not hold requests back from it.
    common: dict[str, Any] = {"max_ongoing_requests": 100_000, "graceful_shutdown_timeout_s": settings.grace}
    replica: Any = serve.deployment(
        name="Replica",
        num_replicas=args.replicas,
        ray_actor_options=actor_options(args),
        health_check_period_s=2,
        max_constructor_retry_count=2,  # wrong options stay wrong
        **common,
    )(Replica)
    front: Any = serve.deployment(name="Front", ray_actor_options={"num_cpus": 0}, **common)(RayFront)
    return front.bind(replica.bind(args, settings))


def actor_options(args: argparse.Namespace) -> dict[str, Any]:
    """What Ray reserves for a replica; with a card, Ray shows it that card only (ASCEND_RT_VISIBLE_DEVICES)."""
    # Ray imports protobuf with its C parser before MindSpore can ask for the one in Python, which it needs.
    variables = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", **python_path()}
    options: dict[str, Any] = {"num_cpus": args.cpus, "runtime_env": {"env_vars": variables}}
    if args.npus:
        options["resources"] = {"NPU": args.npus}
    return options


def python_path() -> dict[str, str]:
    """So that workers find the package and this file, installed or not."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def deploy(app: Any) -> Any:
    """The handle of the front once all replicas are warm. ClosedError with the reason if they do not start."""
    from ray import serve

    try:
        return serve.run(app, name="qwen", route_prefix="/")
    except RuntimeError as error:
        said = serve.status().applications["qwen"].deployments["Replica"].message.strip().splitlines()
        raise ClosedError(f"the replicas did not start: {said[-1] if said else error}") from error


@contextmanager
def running(args: argparse.Namespace, settings: ServerSettings) -> Iterator[str]:
    """Ray and the replicas, ready; gives the address. They end with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    import ray
    from ray import serve

    ray.init(
        address=args.ray_address,
        include_dashboard=False if args.ray_address is None else None,
        num_cpus=None
        if args.ray_address
        else max(int(args.replicas * args.cpus + 0.999), os.cpu_count() or 1),
        runtime_env={"env_vars": python_path()},
        log_to_driver=args.verbose,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own handler, now in place, aborts
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        front = deploy(application(args, settings))
        try:
            yield f"http://{args.host}:{args.port}"
        finally:
            late = front.drain.remote(settings.grace).result()
            print(f"drained{f', {late} requests cut off' if late else ''}", file=sys.stderr, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def check(args: argparse.Namespace) -> None:
    """RequestError for values that cannot be; what ``cli serve`` checks, too."""
    serve_command.check(args)
    if args.replicas < 1:
        raise RequestError(f"--replicas must be at least 1, got {args.replicas}")
    if args.device == "ascend" and not args.npus:
        raise RequestError("--device ascend needs --npus 1: Ray then gives each replica a card of its own")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        quieten(args.verbose)
        with running(args, serve_command.settings_from(args)) as address:
            print(f"{args.replicas} replicas ready at {address}", file=sys.stderr, flush=True)
            while True:
                signal.pause()
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
