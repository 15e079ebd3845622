"""curl and the examples of docs/server.md against a served demo model; streams are judged by their raw bytes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve.clients_openai import CAPITAL, FACES, MODEL

HAS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
pytestmark = [pytest.mark.mindspore, HAS_CURL]
POEM = ("请背诵《静夜思》", "静夜思（李白）\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。")
JSON = ["-H", "Content-Type: application/json"]


def curl(*arguments: str) -> bytes:
    argv = ["curl", "--silent", "--show-error", "--max-time", "60", "--noproxy", "*", *arguments]
    done = subprocess.run(argv, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chunks_of(raw: bytes) -> list[bytes]:
    """The pieces of a body as HTTP carried them (Transfer-Encoding: chunked)."""
    pieces: list[bytes] = []
    while True:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return pieces
        pieces.append(raw[:length])
        assert raw[length : length + 2] == b"\r\n"
        raw = raw[length + 2 :]


def streamed(url: str, body: dict[str, Any]) -> list[bytes]:
    wish = json.dumps({**body, "stream": True}, ensure_ascii=False)
    return chunks_of(curl("-N", "--raw", *JSON, "-d", wish, url))


def check_pieces(pieces: list[bytes]) -> list[Any]:
    """Every piece is one whole event of whole characters; their JSON, without the last."""
    for piece in pieces:
        text = piece.decode("utf-8")
        assert text.startswith("data: ") and text.endswith("\n\n") and text.count("\n") == 2
        assert "\ufffd" not in text
    assert pieces[-1] == b"data: [DONE]\n\n"
    return [json.loads(piece.removeprefix(b"data: ")) for piece in pieces[:-1]]


@pytest.mark.parametrize(("question", "expected"), [FACES, CAPITAL, POEM])
def test_characters_arrive_whole(demo_server: str, question: str, expected: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
    pieces = streamed(f"{demo_server}/v1/chat/completions", body)
    events = check_pieces(pieces)
    contents = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(contents) == expected and len([text for text in contents if text]) > 2
    assert expected[0].encode() in b"".join(pieces), "characters are sent as they are, not escaped"


def test_characters_arrive_whole_to_many_at_once(demo_server: str) -> None:
    def said(pair: tuple[str, str]) -> str:
        body = {"messages": [{"role": "user", "content": pair[0]}], "temperature": 0}
        events = check_pieces(streamed(f"{demo_server}/v1/chat/completions", body))
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)

    pairs = [FACES, CAPITAL, POEM] * 3
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(said, pairs)) == [expected for _, expected in pairs]


def test_completions(demo_server: str) -> None:
    prompts = []
    for question, _ in (FACES, POEM):
        messages = json.dumps({"messages": [{"role": "user", "content": question}]})
        prompts.append(json.loads(curl(*JSON, "-d", messages, f"{demo_server}/tokenize"))["tokens"])
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 60, "echo": True}
    whole = json.loads(curl(*JSON, "-d", json.dumps(body), f"{demo_server}/v1/completions"))
    texts = ["", ""]
    for event in check_pieces(streamed(f"{demo_server}/v1/completions", body)):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert all(text.endswith(expected) for text, (_, expected) in zip(texts, (FACES, POEM), strict=True))


def test_headers(demo_server: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "stream": True, "max_tokens": 1})
    answer = curl("-N", "-i", *JSON, "-d", body, f"{demo_server}/v1/chat/completions")
    head = answer.split(b"\r\n\r\n")[0].decode().lower()
    assert " 200" in head.splitlines()[0]
    for line in ("content-type: text/event-stream", "cache-control: no-cache", "x-accel-buffering: no"):
        assert line in head
    assert "x-request-id: " in head and "content-length" not in head


def test_errors(demo_server: str) -> None:
    answer = curl("-i", *JSON, "-d", '{"messages": 7}', f"{demo_server}/v1/chat/completions")
    assert b" 400" in answer.splitlines()[0]
    assert set(json.loads(answer.split(b"\r\n\r\n")[1])) == {"error"}
    undeclared = curl("-i", "-d", '{"messages": []}', f"{demo_server}/v1/chat/completions")
    assert b" 415" in undeclared.splitlines()[0] and b"application/json" in undeclared


def documented(language: str, words: str) -> str:
    """The example of docs/server.md that holds these words."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    [example] = [
        found for found in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if words in found
    ]
    return str(example)


def test_the_documented_command(demo_server: str) -> None:
    example = documented("shell", "curl ").replace("\\\n", " ").replace("http://127.0.0.1:8000", demo_server)
    program, *arguments = shlex.split(example)
    assert program == "curl"
    answer = curl(*arguments).decode("utf-8")
    assert answer.startswith("data: ") and answer.endswith("data: [DONE]\n\n") and "\ufffd" not in answer


def test_the_documented_program(demo_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = documented("python", "from openai import")
    exec(example.replace("http://127.0.0.1:8000", demo_server), {})
    assert "Qwen" in capsys.readouterr().out
