"""``chat --url``: the conversation with the model of a running server, over OpenAI's streaming API.

Nothing of a model is loaded here. Ctrl-C closes the connection, which makes the server stop the answer.
"""

from __future__ import annotations

import codecs
import ipaddress
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from research.qwen.cli.conversation import SHOWN, Conversation, assignments
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import BusyError, ClosedError, PromptError, QwenError, RequestError
from research.qwen.messages import Delta, Message

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0  # reading waits as long as it takes: a long prompt on a CPU is minutes of silence
WIRE_NAMES = {"max_new_tokens": "max_tokens"}  # where OpenAI's name is another


class RemoteChat(Conversation):
    """A chat whose sampling values are the server's own, but for those that were set here."""

    def __init__(
        self,
        server: Server,
        changes: Mapping[str, Any],
        system: str,
        read: Callable[[str], str] = input,
        show: Callable[[str], None] | None = None,
    ):
        super().__init__(system, read, show)
        self.server = server
        self.changes = checked(changes)

    def stream(self, query: str) -> Iterator[Delta]:
        """Deltas of the answer; the oldest turns are left out, with a notice, when the server's context is full."""
        for left_out in range(len(self.history) + 1):
            messages = self.messages(query)
            kept = [messages[0], *messages[1 + 2 * left_out :]]
            with closing(self.server.stream(kept, self.changes)) as answer:
                try:
                    first = next(answer, Delta())
                except PromptError:
                    if left_out == len(self.history):
                        raise
                    continue
                if left_out:
                    self.show(f"[context full: the oldest {left_out} turns are left out]\n")
                yield first
                yield from answer
                return

    def configure(self, text: str) -> bool:
        """Show or set sampling values; ``none`` gives one back to the server."""
        self.changes = checked(self.changes | assignments(text))
        shown = ", ".join(f"{name}={value}" for name, value in self.changes.items())
        self.show(f"{shown or 'all as the server has them'}\n")
        return True


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are set. RequestError for an unknown or wrong one, before anything is sent."""
    kept = {name: value for name, value in values.items() if value is not None}
    params = SamplingParams.from_mapping(kept)
    for name in kept:
        if name not in SHOWN:
            raise RequestError(f"{name} has no use in a chat; known are {', '.join(SHOWN)}")
    return {name: getattr(params, name) for name in kept}


class Server:
    """A server that speaks OpenAI's API; everything that goes wrong with it is a QwenError of one line."""

    def __init__(self, url: str, api_key: str = "", model: str = ""):
        library = import_httpx()
        self.base, self.model = base_of(url), model
        self.client: httpx.Client = library.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=library.Timeout(None, connect=CONNECT_SECONDS),
            trust_env=not is_loopback(self.base),  # a proxy cannot reach this machine's own ports
        )

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def pick_model(self) -> str:
        """The model to talk to: the one asked for, if the server lists it, else the first of its list."""
        listed = [str(item.get("id")) for item in self._get_json("/models").get("data") or []]
        if self.model and listed and self.model not in listed:
            raise RequestError(f"{self.base} has no model {self.model!r}; it has {', '.join(listed)}")
        if not self.model and not listed:
            raise RequestError(f"{self.base} lists no model; name one with --model")
        self.model = self.model or listed[0]
        return self.model

    def stream(self, messages: list[Message], changes: Mapping[str, Any]) -> Generator[Delta, None, None]:
        """Pieces of an answer as they arrive; closing the iterator closes the connection.

        Raises:
            PromptError: the conversation does not fit the context.
            RequestError, BusyError, ClosedError: refused, or broken off in the middle.
        """
        body = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            **{WIRE_NAMES.get(name, name): value for name, value in changes.items()},
        }
        with (
            self._explained(),
            self.client.stream("POST", f"{self.base}/chat/completions", json=body) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                raise refusal(reply)
            ended = False
            for event in events(reply.iter_bytes()):
                if event == "[DONE]":
                    return
                for delta in deltas(parsed(event)):
                    ended = ended or delta.finish_reason is not None
                    yield delta
        if not ended:
            raise ClosedError(f"{self.base} closed the connection in the middle of the answer; ask again")

    def _get_json(self, path: str) -> dict[str, Any]:
        with self._explained():
            reply = self.client.get(self.base + path)
        if reply.status_code != 200:
            raise refusal(reply)
        return parsed(reply.text)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what httpx raises into our own errors."""
        httpx = import_httpx()
        try:
            yield
        except httpx.ConnectError as error:
            raise RequestError(f"cannot reach {self.base}: {error}; does the server run there?") from error
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise ClosedError(f"the connection to {self.base} broke: {what}; ask again") from error


def import_httpx() -> Any:
    """The module httpx. RequestError that says how to install it."""
    try:
        import httpx
    except ImportError as error:
        raise RequestError("--url needs httpx: pip install 'qwen-mindspore[serve]'") from error
    return httpx


def base_of(url: str) -> str:
    """The address below which the routes are: with or without ``/v1`` in ``url``. RequestError if it is none."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        valid = False
    if not valid or parts.query or parts.fragment:
        raise RequestError(f"--url must look like http://127.0.0.1:8000, got {url!r}")
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


def is_loopback(url: str) -> bool:
    """Whether the address is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Data of each server-sent event; comments and other fields are left out.

    Lines end in LF, CR LF or CR only (as the standard says), so that U+2028 and its like inside an answer break
    nothing, which a splitlines() would. An event that is not closed by an empty line is not complete and is dropped.
    """
    data: list[str] = []
    for line in lines(chunks):
        if not line and data:
            yield "\n".join(data)
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Complete lines of a byte stream in UTF-8, without their ends."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for chunk in chunks:
        rest += decoder.decode(chunk)
        held = "\r" if rest.endswith("\r") else ""  # the LF of a CR LF may come with the next chunk
        whole = rest[: len(rest) - len(held)].replace("\r\n", "\n").replace("\r", "\n")
        *done, rest = whole.split("\n")
        rest += held
        yield from done


def parsed(text: str) -> dict[str, Any]:
    """A JSON object; RequestError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"this is no server of OpenAI's API: it sent {text[:80]!r}")
    return value


def deltas(chunk: dict[str, Any]) -> Iterator[Delta]:
    """What one event of the stream adds to the answer. RequestError for an event that reports an error."""
    if chunk.get("error"):
        raise RequestError(f"the server broke the answer off: {message_of(chunk)}")
    for choice in chunk.get("choices") or []:
        text = (choice.get("delta") or {}).get("content") or ""
        if text or choice.get("finish_reason"):
            yield Delta(text, finish_reason=choice.get("finish_reason"))


def refusal(reply: httpx.Response) -> QwenError:
    """The error a reply other than 200 stands for, in the words of the server."""
    try:
        body = parsed(reply.text)
    except RequestError:
        body = {}
    what = (
        message_of(body) or f"{reply.request.url} answered {reply.status_code} {reply.reason_phrase}".strip()
    )
    code = body["error"].get("code") if isinstance(body.get("error"), dict) else None
    if code == "context_length_exceeded":
        return PromptError(what)
    if reply.status_code in (401, 403):
        return RequestError(f"{what} (give the key with --api-key or in QWEN_API_KEY)")
    if reply.status_code in (429, 503):
        wait = reply.headers.get("retry-after")
        hint = f"; try again in {wait} s" if wait and wait.isdigit() else "; try again later"
        return (BusyError if reply.status_code == 429 else ClosedError)(what.rstrip(".") + hint)
    return RequestError(what)


def message_of(body: Mapping[str, Any]) -> str:
    """The text in OpenAI's error envelope, or nothing."""
    error = body.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")
