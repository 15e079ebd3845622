"""``chat --url``, line by line, against a scripted server."""

from __future__ import annotations

import contextlib
import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.qwen.cli import main
from research.qwen.cli.remote import RemoteChat, Server, base_of, events, is_loopback
from research.qwen.errors import BusyError, ClosedError, QwenError, RequestError
from research.qwen.messages import Message
from tests.cli.sse_server import DONE, Reply, Script, answer, chunk, error, scripted_server
from tests.cli.test_chat import Terminal
from tests.cli.test_interrupt import Terminal as RealTerminal

ANSWER = "你好！😀 fine."


def chat(script, *lines, changes=None, system="sys"):
    """The session after the lines, and what it showed."""
    terminal = Terminal(*lines)
    with scripted_server(script) as url, contextlib.closing(Server(url, script.key)) as server:
        server.pick_model()
        session = RemoteChat(server, changes or {}, system, terminal.read, terminal.show)
        assert session.run() == 0
    return session, terminal.shown


def sent(request):
    return [(message["role"], message["content"]) for message in request["messages"]]


def test_answers_stream_and_the_history_is_sent():
    script = Script([answer("你", "好！😀", " fine."), answer("ok")])
    session, shown = chat(script, "one", "two")
    assert shown == f"{ANSWER}\nok\n\n"
    assert session.history == [("one", ANSWER), ("two", "ok")]
    assert sent(script.requests[1]) == [
        ("system", "sys"),
        ("user", "one"),
        ("assistant", ANSWER),
        ("user", "two"),
    ]
    assert script.requests[0]["model"] == "demo" and script.requests[0]["stream"] is True


def test_only_the_values_that_were_set_are_sent():
    script = Script([answer("a"), answer("b"), answer("c")])
    _, shown = chat(
        script,
        "one",
        "/conf temperature=0.5 max_new_tokens=7 seed=3",
        "two",
        "/conf seed=none",
        "three",
        "/conf",
        changes={"top_k": 4, "stop": ("X",)},
    )
    plain = {"model", "messages", "stream"}
    values = [{name: r[name] for name in r if name not in plain} for r in script.requests]
    first = {"top_k": 4, "stop": ["X"]}
    assert values == [
        first,
        first | {"temperature": 0.5, "max_tokens": 7, "seed": 3},
        first | {"temperature": 0.5, "max_tokens": 7},
    ]
    assert shown.endswith("top_k=4, stop=('X',), temperature=0.5, max_new_tokens=7\n\n")


@pytest.mark.parametrize("line", ["/conf top_p=2", "/conf nonsense=1", "/conf seed", "/conf n=2"])
def test_wrong_values_are_refused_before_anything_is_sent(line):
    script = Script()
    session, shown = chat(script, line)
    assert shown.startswith("error: ") and session.changes == {} and script.requests == []


def test_commands_work_as_in_the_local_chat():
    script = Script([answer("1"), answer("2"), answer("3")])
    session, shown = chat(
        script, "/regen", "/system be brief", "one", "/regen", "/history", "/clear", "two\\", "lines", "/nope"
    )
    assert shown.startswith("error: nothing to answer again yet\n") and "> one\n2\n" in shown
    assert sent(script.requests[0]) == sent(script.requests[1]) == [("system", "be brief"), ("user", "one")]
    assert session.history == [("two\nlines", "3")] and "unknown command /nope" in shown


def test_ctrl_c_closes_the_connection_and_keeps_what_came():
    script = Script([Reply([chunk("half"), chunk(" way")], hold=True), answer("next")])
    terminal = Terminal("one", "two")

    def interrupted(text):
        terminal.show(text)
        if text == " way":
            raise KeyboardInterrupt

    with scripted_server(script) as url, contextlib.closing(Server(url)) as server:
        server.pick_model()
        session = RemoteChat(server, {}, "", terminal.read, interrupted)
        assert session.run() == 0
        assert script.client_left.wait(10)
    assert "half way [stopped]\n" in terminal.shown
    assert session.history == [("one", "half way"), ("two", "next")]


def test_oldest_turns_go_when_the_context_is_full():
    full = error(400, "too long", "context_length_exceeded")
    script = Script([answer("1"), answer("2"), answer("3"), full, full, answer("4")])
    session, shown = chat(script, "a", "b", "c", "d")
    assert "[context full: the oldest 2 turns are left out]\n4\n" in shown
    assert sent(script.requests[-1]) == [("system", "sys"), ("user", "c"), ("assistant", "3"), ("user", "d")]
    assert len(session.history) == 4  # left out of the prompt, not forgotten


def test_a_message_that_never_fits_is_an_error():
    full = error(400, "too long: 9 of 8 tokens", "context_length_exceeded")
    session, shown = chat(Script([answer("1"), full, full]), "a", "b")
    assert "error: too long: 9 of 8 tokens\n" in shown and session.history == [("a", "1")]


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        (error(429, "the queue is full.", retry_after="3"), BusyError, "the queue is full; try again in 3 s"),
        (error(503, "loading"), ClosedError, "loading; try again later"),
        (error(400, "temperature must be"), RequestError, "temperature must be"),
        (Reply(status=502, body=b"<html>"), RequestError, "answered 502 Bad Gateway"),
        (Reply([b'data: {"error": {"message": "model died"}}\n\n']), RequestError, "model died"),
        (Reply([b'data: {"error": "gone"}\n\n']), RequestError, "gone"),
        (Reply([chunk("half")]), ClosedError, "in the middle of the answer"),
        (Reply([b"data: [1, 2]\n\n"]), RequestError, "no server of OpenAI's API"),
    ],
)
def test_what_goes_wrong_is_one_line(reply, kind, text):
    with scripted_server(Script([reply])) as url, contextlib.closing(Server(url, model="m")) as server:
        with pytest.raises(QwenError, match=text) as caught:
            list(server.stream([Message("user", "x")], {}))
        assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_an_error_in_the_answer_begins_its_own_line_and_leaves_no_turn():
    script = Script([Reply([chunk("half"), b'data: {"error": {"message": "died"}}\n\n']), answer("ok")])
    session, shown = chat(script, "one", "two")
    assert shown.startswith("half\nerror: the server broke the answer off: died\nok\n")
    assert session.history == [("two", "ok")]


def test_a_stream_may_end_without_done():
    script = Script([Reply([chunk("all"), chunk(finish="length")])])
    assert chat(script, "one")[0].history == [("one", "all")]


def test_models_are_listed_and_checked():
    with scripted_server(Script(models=["a", "b"])) as url:
        for name, expected in (("", "a"), ("b", "b")):
            with contextlib.closing(Server(url, model=name)) as server:
                assert server.pick_model() == expected
        server = Server(url, model="c")
        with contextlib.closing(server), pytest.raises(RequestError, match="no model 'c'; it has a, b"):
            server.pick_model()
    empty = scripted_server(Script(models=[]))
    with (
        empty as url,
        contextlib.closing(Server(url)) as server,
        pytest.raises(RequestError, match="--model"),
    ):
        server.pick_model()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_answers_and_explains(monkeypatch, capsys):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")  # not for this machine's own ports
    script = Script([answer(ANSWER)], key="secret")
    with scripted_server(script) as url:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        monkeypatch.setenv("QWEN_API_KEY", "secret")
        assert main(["chat", "--url", url, "--greedy", "--max-new-tokens", "5"]) == 0
        assert ANSWER in capsys.readouterr().out
        assert script.requests[0]["temperature"] == 0 and script.requests[0]["max_tokens"] == 5
        assert main(["chat", "--url", url, "--api-key", "wrong"]) == 2
        assert "wrong API key (give the key with --api-key" in capsys.readouterr().err
    assert main(["chat", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "does the server run there?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["folder", "--url", "http://x"], "MODEL loads a model here"),
        (["--dtype", "int4", "--url", "http://x"], "--dtype loads a model here"),
        (["--api-key", "k"], "give --url too"),
        (["--model", "m"], "give --url too"),
        (["--url", "localhost:8000"], "must look like"),
        (["--url", ""], "must look like"),
        (["--url", "http://h:port"], "must look like"),
    ],
)
def test_options_that_do_not_fit(argv, text, capsys):
    assert main(["chat", *argv]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("http://[::1]:8000/qwen", "http://[::1]:8000/qwen/v1"),
    ],
)
def test_addresses(url, base):
    assert base_of(url) == base


def test_loopback():
    assert all(
        is_loopback(f"http://{host}:1/v1") for host in ("127.0.0.1", "localhost", "[::1]", "127.9.9.9")
    )
    assert not is_loopback("http://10.0.0.1/v1") and not is_loopback("http://example.org/v1")


STREAM = (
    ": ping\n\n"
    'data: {"a": "你\u2028好\x85"}\n\n'
    "event: x\r\ndata:one\r\ndata: two\r\n\r\n"
    "id: 7\rdata: cr\r\r"
    "data: [DONE]\n\n"
    "data: cut off"
)


@given(cuts=st.lists(st.integers(0, len(STREAM.encode())), max_size=12))
def test_events_for_any_split_of_the_bytes(cuts):
    data = STREAM.encode()
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert list(events(pieces)) == ['{"a": "你\u2028好\x85"}', "one\ntwo", "cr", "[DONE]"]


def test_done_is_an_event():
    assert list(events([DONE])) == ["[DONE]"]


def test_without_httpx_the_message_says_what_to_install(repository: Path):
    code = (
        "import sys; sys.modules['httpx'] = None; sys.modules['fastapi'] = None\n"
        "from research.qwen.cli import main; raise SystemExit(main(['chat', '--url', 'http://127.0.0.1:1']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert run.stderr.strip() == "error: --url needs httpx: pip install 'qwen-mindspore[serve]'"


def test_nothing_of_a_model_is_imported(repository: Path):
    code = (
        "import sys; import research.qwen.cli.remote\n"
        "print([m for m in ('mindspore', 'fastapi', 'httpx', 'research.qwen.engine') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat():
    script = Script([Reply([chunk("half")], hold=True), answer("whole")])
    with scripted_server(script) as url:
        terminal = RealTerminal("chat", "--url", url)
        try:
            terminal.until("> ")
            terminal.send(b"one\n")
            terminal.until("half")
            terminal.send(b"\x03")
            shown = terminal.until("[stopped]")
            assert script.client_left.wait(10)
            if "> " not in shown.partition("[stopped]")[2]:  # the prompt may have come with it
                terminal.until("> ")
            terminal.send(b"two\n")
            terminal.until("whole")
            terminal.send(b"/exit\n")
            assert terminal.exit_code() == 0
        finally:
            terminal.kill()
