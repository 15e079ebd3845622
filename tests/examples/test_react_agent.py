"""The agent's loop on a scripted model in this process, and on a scripted server."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from examples.react import run as script
from examples.react.agent import Agent, EngineBackend, ServerBackend, ServerError
from examples.react.toolbox import Toolbox, calculator, employee_database
from research.qwen.engine import Engine
from research.qwen.errors import RequestError
from research.qwen.messages import Message
from tests.examples.transcript_lm import transcript_engine

QUESTION = "研发部每个月的工资总共是多少？"
ANSWER = "研发部每个月的工资总共是44000元。"
ROWS = (
    '[{"name": "张伟", "department": "研发部", "role": "工程师", "salary": 18000}, '
    '{"name": "李娜", "department": "研发部", "role": "架构师", "salary": 26000}]'
)
# What the model says, with the observations in between: it goes on only behind exactly this text.
TRANSCRIPT = f"""Thought: 先查研发部的员工。
Action: employee_database
Action Input: {{"department": "研发部"}}
Observation: {ROWS}
Thought: 再把工资加起来。
Action: calculator
Action Input: {{"expression": "18000 + 26000"}}
Observation: 44000
Thought: I now know the final answer.
Final Answer: {ANSWER}"""


def _toolbox() -> Toolbox:
    return Toolbox([employee_database(), calculator()])


def test_two_tools_one_after_the_other() -> None:
    shown: list[str] = []
    agent = Agent(
        EngineBackend(transcript_engine(TRANSCRIPT), show=shown.append), _toolbox(), show=shown.append
    )
    messages = agent.run([Message("user", QUESTION)])
    assert [message.role for message in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [call.name for message in messages for call in message.tool_calls] == [
        "employee_database",
        "calculator",
    ]
    assert [message.content for message in messages] == [
        "先查研发部的员工。",
        ROWS,
        "再把工资加起来。",
        "44000",
        ANSWER,
    ]
    assert messages[1].tool_call_id == messages[0].tool_calls[0].id
    assert "".join(shown) == (
        f'先查研发部的员工。\n[employee_database] {{"department": "研发部"}}\n-> {ROWS}\n'
        f'再把工资加起来。\n[calculator] {{"expression": "18000 + 26000"}}\n-> 44000\n{ANSWER}'
    )


def test_a_question_without_tools() -> None:
    assert Agent(EngineBackend(transcript_engine("你好！")), _toolbox()).ask("你好") == "你好！"
    assert Agent(EngineBackend(transcript_engine("你好！")), Toolbox([])).ask("你好") == "你好！"


def test_the_last_step_has_to_answer() -> None:
    engine = transcript_engine(TRANSCRIPT)
    agent = Agent(EngineBackend(engine), _toolbox(), max_steps=1)
    messages = agent.run([Message("user", QUESTION)])
    # Without tools the model's second call is not one: what it thought is all there is.
    assert [message.role for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[-1].tool_calls == ()


def test_an_agent_needs_a_vocabulary() -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        EngineBackend(Engine(transcript_engine(TRANSCRIPT).lm))


class Server:
    """Answers each request with the next of ``replies``: a message, or (status, body)."""

    def __init__(self, *replies: Any):
        self.replies, self.requests = list(replies), []  # type: ignore[var-annotated]


@contextlib.contextmanager
def _serving(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            reply = server.replies.pop(0)
            status, text = reply if isinstance(reply, tuple) else (200, _completion(reply))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()


def _completion(message: dict[str, Any]) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", **message}}]}).encode()


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"content": None, "tool_calls": [{"id": "call_a", "type": "function", "function": function}]}


def test_the_same_over_a_server() -> None:
    server = Server(_call("calculator", '{"expression": "6*7"}'), {"content": "42."})
    with _serving(server) as url:
        backend = ServerBackend(f"{url}/v1/", model="m", api_key="secret")
        assert Agent(backend, _toolbox()).ask("6*7?") == "42."
    (path, key, first), (_, _, second) = server.requests
    assert (path, key, first["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert [tool["function"]["name"] for tool in first["tools"]] == ["employee_database", "calculator"]
    assert first["messages"] == [{"role": "user", "content": "6*7?"}]
    assert second["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"expression": "6*7"}'
    assert second["messages"][2] == {"role": "tool", "content": "42", "tool_call_id": "call_a"}
    assert [request["tool_choice"] for request in (first, second)] == ["auto", "auto"]


@pytest.mark.slow
def test_the_same_over_our_own_server() -> None:
    pytest.importorskip("fastapi")
    from research.qwen.serve.app import create_app
    from tests.serve.running import running_state, serve_app

    with running_state(transcript_engine(TRANSCRIPT)) as state, serve_app(create_app(state)) as url:
        messages = Agent(ServerBackend(url), _toolbox()).run([Message("user", QUESTION)])
    assert [call.name for message in messages for call in message.tool_calls] == [
        "employee_database",
        "calculator",
    ]
    assert [message.content for message in messages][1::2] == [ROWS, "44000"]
    assert messages[-1].content == ANSWER


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, b'{"error": {"message": "no such key"}}'), "401: no such key"),
        ((502, b"bad gateway"), "502: bad gateway"),
        ((200, b"<html>"), "is the server running"),
        ((200, b'{"choices": []}'), "not a chat completion"),
    ],
)
def test_errors_of_the_server(reply: Any, message: str) -> None:
    with _serving(Server(reply)) as url, pytest.raises(ServerError, match=message):
        Agent(ServerBackend(url), _toolbox()).ask("?")


def test_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(_call("calculator", "6*7"), {"content": "42."}, {"content": "Yes."})
    with _serving(server) as url:
        assert script.main(["6*7?", "Sure?", "--url", url]) == 0
    out = capsys.readouterr().out
    assert out == "> 6*7?\n\n[calculator] 6*7\n-> 42\n42.\n> Sure?\nYes.\n"
    assert [message["role"] for message in server.requests[-1][2]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert "code_interpreter" not in json.dumps(server.requests)


def test_the_script_loads_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda path, dtype: transcript_engine(TRANSCRIPT))
    assert script.main(["--model", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"> {QUESTION}\n") and out.endswith(f"{ANSWER}\n")


def test_the_script_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["?", "--url", "http://127.0.0.1:9"]) == 2
    assert "is the server running" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["?"])
