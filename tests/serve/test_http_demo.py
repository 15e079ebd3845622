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


def embed(server: ServerProcess, given: object) -> np.ndarray:
    body = httpx.post(f"{server.url}/v1/embeddings", json={"input": given}, timeout=60).json()
    return np.asarray([item["embedding"] for item in body["data"]], np.float32)


def test_embeddings_do_not_depend_on_what_is_asked_beside(server: ServerProcess) -> None:
    texts = ["深度学习入门的书籍", "hello, who are you?", "你好，我是演示模型。" * 80, "你好"]
    together = embed(server, texts)
    assert together.shape == (4, 128)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_array_equal(embed(server, text)[0], vector)
    assert (together @ together.T - np.eye(4) < 0.999).all(), "four texts, four vectors"


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
