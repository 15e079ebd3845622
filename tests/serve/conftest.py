"""Servers that are shared by the tests that do not change them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerState
from tests.serve.processes import server_process
from tests.serve.running import fake_engine, running_state, serve_app


@pytest.fixture(scope="module")
def fake_state() -> Iterator[ServerState]:
    """A ready state with the fake model."""
    with running_state(fake_engine()) as state:
        yield state


@pytest.fixture(scope="module")
def fake_url(fake_state: ServerState) -> Iterator[str]:
    """Base URL of a server with the fake model."""
    with serve_app(create_app(fake_state)) as url:
        yield url


@pytest.fixture(scope="module")
def client(fake_url: str) -> Iterator[httpx.Client]:
    """An HTTP client of that server."""
    with httpx.Client(base_url=fake_url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def demo_server() -> Iterator[str]:
    """Base URL of the command ``serve`` with the demo model, in a process of its own; loaded once for all clients."""
    with server_process("research.qwen.cli serve", "--log-level", "warning") as server:
        yield server.ready()
