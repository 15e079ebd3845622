"""The command with the demo model: ready when warm, right answers, and signals while MindSpore computes."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.serve.processes import INT, TERM, ServerProcess, Streaming, server_process
from tests.serve.running import demo_tokenizer

pytestmark = pytest.mark.mindspore

SERVE = "research.qwen.cli serve"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(SERVE, "--grace", "20") as server:
        server.ready()
        yield server


def test_it_answers(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "你是谁？"}], "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["model"] == "qwen-demo"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "Qwen" in answer["choices"][0]["message"]["content"]


def test_embeddings_tell_texts_apart(server: ServerProcess) -> None:
    texts = ["深度学习入门的书籍", "深度学习的书籍", "hello, who are you?"]
    body = httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60).json()
    vectors = np.asarray([item["embedding"] for item in body["data"]])
    assert vectors.shape == (3, 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > likeness[0, 2] and likeness[0, 1] > likeness[1, 2]


def test_the_vocabulary_is_that_of_the_model(server: ServerProcess) -> None:
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "你好"}).json()["tokens"]
    assert ids == demo_tokenizer().encode("你好")


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_under_load(number: int) -> None:
    with server_process(SERVE, "--grace", "20") as server:
        streams = [Streaming(server.ready(), 300) for _ in range(4)]
        server.send(number)
        for stream in streams:
            stream.wait()
            assert stream.broken is None and stream.events[-1] == "data: [DONE]"
        assert server.exit_code() == 0


def test_what_cannot_be_loaded(tmp_path) -> None:
    with server_process(SERVE, str(tmp_path)) as server:
        assert server.exit_code() == 2
    assert server.lines[-1].startswith("error: ")
