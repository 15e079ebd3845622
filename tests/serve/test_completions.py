"""POST /v1/completions, whole answers: prompts of all forms, echo, scores, several choices."""

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


def test_answer_has_the_form_of_openai(server: Script) -> None:
    body = server.complete(max_tokens=100)
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello, 你好 🙂!", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["prompt_tokens"] == len(server.lm.tokenizer.encode("hi"))


def test_default_length_is_sixteen_tokens(server: Script) -> None:
    server.lm.reply = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    body = server.complete()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


def test_echo_scores_prompt_and_answer(server: Script) -> None:
    body = server.complete(prompt="你好", echo=True, logprobs=2, max_tokens=1)
    [choice] = body["choices"]
    assert choice["text"] == "你好Hello" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["你好", "Hello"]
    assert choice["logprobs"]["text_offset"] == [0, 2]
    assert choice["logprobs"]["token_logprobs"][0] is None
