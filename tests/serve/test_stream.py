"""Streams: the events of both routes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.scripted import Script, scripted_server


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello") as script:
        yield script


@pytest.fixture(autouse=True)
def _fresh(server: Script) -> None:
    server.lm.reply = "Hello, 你好 🙂!"
    server.asked.clear()


def test_chat_chunks(server: Script) -> None:
    chunks = server.chat_events()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_completion_chunks(server: Script) -> None:
    chunks = server.events("/v1/completions", {"prompt": "hi", "max_tokens": 50})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello, 你好 🙂!"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
