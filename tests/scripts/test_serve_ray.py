"""The relay in front of the replicas, without Ray: replicas are small apps that live or die as told."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from research.qwen.errors import RequestError
from scripts import serve_ray


class DeadError(Exception):
    """A replica is gone."""


class Messages:
    """What a call of a replica gives: messages, and death after ``dies_after`` of them; notes a cancellation."""

    def __init__(self, messages, dies_after=None):
        self.messages, self.dies_after = messages, dies_after
        self.given, self.cancelled = 0, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.given == self.dies_after:
            raise DeadError
        self.given += 1
        return await anext(self.messages)

    def cancel(self):
        self.cancelled = True


async def echo(request: Request) -> PlainTextResponse:
    body = (await request.body()).decode()
    return PlainTextResponse(
        f"{request.method} {request.url.path}?{request.url.query} {body}", 201, {"x-a": "b"}
    )


async def stream(request: Request) -> StreamingResponse:
    async def pieces():
        for number in range(3):
            yield f"data: {number}\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


APP = Starlette(routes=[Route("/echo", echo, methods=["POST"]), Route("/stream", stream)])


def front(*deaths, max_body=100):
    """A front whose n-th call gets a replica that dies after ``deaths[n]`` messages; the calls made."""
    calls = []
    plan = iter(deaths)

    def call(scope, body):
        calls.append(Messages(serve_ray.run_app(APP, scope, body), next(plan, None)))
        return calls[-1]

    return serve_ray.Front(call, (DeadError,), max_body), calls


async def ask(app, path, body=b"", headers=()):
    """Status, headers and body of the response, as a client gets them."""
    method = "POST" if body else "GET"
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": list(headers),
        "app": "not for replicas",
    }

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    response = await app.handle(Request(scope, receive))
    if hasattr(response, "body_iterator"):
        return (
            response.status_code,
            dict(response.raw_headers),
            b"".join([p async for p in response.body_iterator]),
        )
    return response.status_code, dict(response.raw_headers), response.body


def test_requests_and_responses_pass_unchanged():
    relay, calls = front()
    status, headers, body = asyncio.run(ask(relay, "/echo?x=1", b"hello"))
    assert (status, body, headers[b"x-a"]) == (201, b"POST /echo?x=1 hello", b"b")
    assert len(calls) == 1 and not calls[0].cancelled


def test_streams_pass_piece_by_piece():
    async def pieces():
        relay, _ = front()
        response = await relay.handle(Request(get("/stream"), receive=no_body))
        return [piece async for piece in response.body_iterator]

    assert asyncio.run(pieces()) == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]


def get(path):
    return {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}


async def no_body():
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize("deaths", [(0,), (0, 0)])
def test_a_request_that_got_no_answer_goes_to_another_replica(deaths):
    relay, calls = front(*deaths)
    status, _, body = asyncio.run(ask(relay, "/echo", b"again"))
    assert (status, body) == (201, b"POST /echo? again")
    assert len(calls) == len(deaths) + 1


def test_replicas_that_die_one_after_the_other_are_a_503():
    relay, calls = front(0, 0, 0, 0)
    status, headers, body = asyncio.run(ask(relay, "/echo", b"x"))
    assert status == 503 and len(calls) == 3
    assert headers[b"retry-after"] == b"1" and headers[b"x-should-retry"] == b"true"
    assert json.loads(body)["error"]["message"] == serve_ray.DIED


def test_a_stream_that_breaks_off_ends_with_an_error_event_and_is_not_begun_again():
    relay, calls = front(2)
    status, _, body = asyncio.run(ask(relay, "/stream"))
    events = body.decode().split("\n\n")
    assert status == 200 and len(calls) == 1
    assert events[0] == "data: 0" and events[2] == ""
    assert json.loads(events[1].removeprefix("data: "))["error"]["message"] == serve_ray.DIED


def test_another_body_that_breaks_off_is_no_whole_response():
    relay, _ = front(1)
    with pytest.raises(DeadError):
        asyncio.run(ask(relay, "/echo", b"x"))


def test_bodies_have_a_limit():
    relay, calls = front(max_body=4)
    status, _, body = asyncio.run(ask(relay, "/echo", b"12345"))
    assert status == 413 and json.loads(body)["error"]["type"] == "invalid_request_error" and calls == []


def test_a_client_that_leaves_cancels_the_call():
    async def leave():
        relay, calls = front()
        response = await relay.handle(Request(get("/stream"), receive=no_body))
        iterator = response.body_iterator
        await anext(iterator)
        await iterator.aclose()
        return calls

    assert asyncio.run(leave())[0].cancelled


class Slow(Messages):
    """Waits after its second message until it is cancelled."""

    async def __anext__(self):
        while self.given == 2 and not self.cancelled:
            await asyncio.sleep(0)
        if self.cancelled:
            raise DeadError
        return await super().__anext__()


def test_draining_refuses_new_requests_and_lets_others_finish():
    async def drain():
        relay, calls = front()
        begun = await relay.handle(Request(get("/stream"), receive=no_body))
        ended = asyncio.ensure_future(relay.drain(10))
        await asyncio.sleep(0)
        refused = await ask(relay, "/echo", b"x")
        body = b"".join([piece async for piece in begun.body_iterator])
        return refused, body, await ended, len(calls)

    refused, body, late, calls = asyncio.run(drain())
    assert refused[0] == 503 and json.loads(refused[2])["error"]["message"] == serve_ray.STOPPING
    assert body.endswith(b"data: 2\n\n") and late == 0 and calls == 1


def test_what_outlives_the_grace_time_ends_with_an_error_event():
    async def drain():
        relay = serve_ray.Front(lambda *request: Slow(serve_ray.run_app(APP, *request)), (DeadError,), 100)
        begun = await relay.handle(Request(get("/stream"), receive=no_body))
        late = asyncio.ensure_future(relay.drain(0.01))
        return b"".join([piece async for piece in begun.body_iterator]), await late, relay.active

    body, late, active = asyncio.run(drain())
    assert body.startswith(b"data: 0\n\ndata: {") and serve_ray.STOPPING.encode() in body
    assert late == 1 and not active


def test_the_app_sees_a_client_that_leaves():
    seen = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"question"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def leave():
        messages = serve_ray.run_app(app, get("/"), b"question")
        assert (await anext(messages))["status"] == 200
        await messages.aclose()
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(leave())
    assert seen == ["http.disconnect"]


def test_what_an_app_raises_is_raised():
    async def app(scope, receive, send):
        raise ValueError("broken")

    async def run():
        return [message async for message in serve_ray.run_app(app, get("/"), b"")]

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run())


def test_an_event_stream_is_known_by_its_type():
    assert serve_ray.is_event_stream([(b"Content-Type", b"text/event-stream; charset=utf-8")])
    assert not serve_ray.is_event_stream([(b"content-type", b"application/json")])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--device", "ascend"], "--npus 1"),
        (["--port", "70000"], "--port"),
    ],
)
def test_options_are_checked(argv, text, capsys):
    assert serve_ray.main(argv) == 2
    assert text in capsys.readouterr().err
    with pytest.raises((RequestError, ValueError), match=text):
        serve_ray.check(serve_ray.build_parser().parse_args(argv))


def test_what_ray_reserves():
    args = serve_ray.build_parser().parse_args(["--device", "ascend", "--npus", "1", "--cpus", "4"])
    serve_ray.check(args)
    options = serve_ray.actor_options(args)
    assert options["num_cpus"] == 4 and options["resources"] == {"NPU": 1}
