"""A fake server that is shared by the tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerState
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
