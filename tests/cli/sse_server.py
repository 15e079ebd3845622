"""A small OpenAI-style server on a free loopback port that says what a test tells it to, byte by byte."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What one POST gets: a stream of ``pieces`` (closed after them, or held open), or an error body."""

    pieces: list[bytes] = field(default_factory=list)
    status: int = 200
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    hold: bool = False  # keep the connection open after the pieces until the client leaves


@dataclass
class Script:
    """The replies to come, the requests that came, and whether a held client has left."""

    replies: list[Reply] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["demo"])
    key: str = ""
    requests: list[dict] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)


def chunk(text: str = "", finish: str | None = None, **delta: object) -> bytes:
    """One event of a chat stream; characters are sent as they are, not as \\u escapes."""
    choice = {"index": 0, "delta": {"content": text, **delta} if text else delta, "finish_reason": finish}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def answer(*texts: str) -> Reply:
    """A whole answer, as servers stream it."""
    middle = [chunk(text) for text in texts]
    return Reply([chunk(role="assistant", content=""), *middle, chunk(finish="stop"), DONE])


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """A refusal in OpenAI's envelope."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Reply(
        status=status, body=body, headers={name.replace("_", "-"): headers[name] for name in headers}
    )


@contextlib.contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Its address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

        def do_GET(self) -> None:
            if not self.allowed():
                return
            if self.path != "/v1/models":
                self.send_json(404, {"error": {"message": f"no route {self.path}"}})
                return
            self.send_json(200, {"object": "list", "data": [{"id": name} for name in script.models]})

        def do_POST(self) -> None:
            script.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if not self.allowed():
                return
            reply = script.replies.pop(0)
            if reply.status != 200:
                self.send_json(reply.status, reply.body, reply.headers)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in reply.pieces:
                self.wfile.write(piece)
                self.wfile.flush()
            if reply.hold and self.connection.recv(1) == b"":
                script.client_left.set()
            self.close_connection = True

        def allowed(self) -> bool:
            if script.key and self.headers.get("Authorization") != f"Bearer {script.key}":
                self.send_json(401, {"error": {"message": "wrong API key"}})
                return False
            return True

        def send_json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
