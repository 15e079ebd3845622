"""``chat --url`` against the project's own server, with a fake model behind it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

import pytest

from research.qwen.cli import main
from research.qwen.cli.remote import RemoteChat, Server
from research.qwen.errors import RequestError
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings
from tests.cli.test_chat import Terminal
from tests.serve.running import fake_engine, running_state, serve_app

pytestmark = pytest.mark.slow

SETTINGS = ServerSettings(model_names=("fake", "other"), api_keys=("secret",))
VALUES = {"temperature": 0.8, "seed": 5, "max_new_tokens": 20, "ignore_eos": True, "top_k": 50}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that asks for a key; its context holds 512 tokens."""
    with running_state(fake_engine(), SETTINGS) as state, serve_app(create_app(state)) as address:
        yield address


def chat(url, *lines, **changes):
    terminal = Terminal(*lines)
    with contextlib.closing(Server(url, "secret")) as server:
        assert server.pick_model() == "fake"
        session = RemoteChat(server, VALUES | changes, "sys", terminal.read, terminal.show)
        assert session.run() == 0
    return session, terminal.shown


def test_the_same_question_and_seed_get_the_same_answer(url):
    session, shown = chat(url, "你好", "/regen", "/conf seed=6", "/regen")
    first, second, _, third = shown.splitlines()[:4]
    assert first == second != third and first
    assert session.history == [("你好", third)]


def test_a_full_context_drops_the_oldest_turns(url):
    session, shown = chat(url, *["question " * 20 for _ in range(8)], max_new_tokens=60)
    assert "turns are left out]" in shown and "error" not in shown
    assert len(session.history) == 8


def test_what_never_fits_is_an_error(url):
    session, shown = chat(url, "x" * 2000)
    assert shown.startswith("error: ") and "512" in shown and session.history == []


def test_a_value_the_server_refuses_is_its_error(url):
    _, shown = chat(url, "hello", max_new_tokens=5000)
    assert shown.startswith("error: ") and "5000" in shown


def test_keys_and_models(url, monkeypatch, capsys):
    with contextlib.closing(Server(url)) as server, pytest.raises(RequestError, match="--api-key"):
        server.pick_model()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    options = ["--api-key", "secret", "--max-new-tokens", "3", "--seed", "1"]
    assert main(["chat", "--url", f"{url}/v1", "--model", "other", *options]) == 0
    assert main(["chat", "--url", url, "--model", "missing", *options]) == 2
    assert "has no model 'missing'; it has fake, other" in capsys.readouterr().err
