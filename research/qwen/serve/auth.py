"""Who may ask: API keys, their check in every request but the open ones, and the check of the host name."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from research.qwen.errors import ConfigError
from research.qwen.serve.errors import ApiError, error_response

ENVIRONMENT = "QWEN_API_KEY"
OPEN_PATHS = frozenset(("/health", "/", "/favicon.ico"))
OPEN_PREFIX = "/static/"  # the page: it asks for a key and sends it with its requests


def read_keys(
    given: Iterable[str] = (), file: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Keys of options, of a file (one a line, # begins a comment line) and of QWEN_API_KEY (separated by commas).

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key cannot be sent in a header.
    """
    keys = list(given)
    if file is not None:
        keys += _from_file(Path(file))
    named = (os.environ if environ is None else environ).get(ENVIRONMENT, "")
    keys += [key.strip() for key in named.split(",") if key.strip()]
    for place, key in enumerate(keys, 1):
        if not key or not all("!" <= letter <= "~" for letter in key):
            raise ConfigError(f"API key {place} is empty or has blanks or letters other than ASCII")
    return tuple(dict.fromkeys(keys))


def _from_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API key file {path} cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"API key file {path} holds no key; write one a line")
    return keys


class KeyRing:
    """Compares a key with all that are known, in a time that says nothing about them."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def __contains__(self, key: bytes) -> bool:
        given, found = _digest(key), False
        for known in self._digests:  # no early end, so that the place of the key does not show
            found |= hmac.compare_digest(given, known)
        return found


class KeyCheck:
    """ASGI: 401 without a known ``Authorization: Bearer``; with no keys configured everything is let through."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], *, open_metrics: bool = False, root_path: str = ""):
        self.app, self.root_path = app, root_path
        self.ring = KeyRing(keys) if keys else None
        self.open_paths = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and self.ring is not None and not self._open(scope):
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        path = str(scope["path"])
        if self.root_path and path.startswith(self.root_path + "/"):
            path = path.removeprefix(self.root_path)
        return path in self.open_paths or path.startswith(OPEN_PREFIX)

    def _refusal(self, scope: Scope) -> ApiError | None:
        assert self.ring is not None
        header = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() == b"bearer" and key.strip() in self.ring:
            return None
        given = scheme.lower() == b"bearer" and key.strip()
        message = "the API key is not known here" if given else "send an API key: Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class HostCheck:
    """ASGI: 403 for a request to a host name that is not this machine's.

    A page on the internet can let its own name point to 127.0.0.1, and is then of the same origin as a server there:
    without keys nothing else would stop it. Such a name has a dot in it and is no address.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()):
        self.app, self.allowed = app, frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            host = next((value for key, value in scope["headers"] if key == b"host"), b"").decode("latin-1")
            if not self.accepts(host):
                what = "this host name is not served without an API key; allow it with --allowed-host"
                await error_response(ApiError(403, what, code="host_not_allowed"))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def accepts(self, host: str) -> bool:
        """Whether requests with this Host header are served."""
        name = host.lower()
        if not name.endswith("]"):  # else an IPv6 address without a port
            name = name.rsplit(":", 1)[0] if ":" in name else name
        name = name.strip("[]").rstrip(".")
        return "." not in name or name.endswith(".localhost") or name in self.allowed or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
