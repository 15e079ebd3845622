"""POST /v1/chat/completions, whole answers: bodies, finish reasons, what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.scripted import Script, scripted_server

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello") as script:
        yield script


@pytest.fixture(autouse=True)
def _fresh(server: Script) -> None:
    server.lm.reply = "Hello, 你好 🙂!"
    server.asked.clear()


def test_answer_has_the_form_of_openai(server: Script) -> None:
    body = server.chat(model="qwen")
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion" and body["model"] == "qwen"
    assert isinstance(body["created"], int) and body["system_fingerprint"]
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello, 你好 🙂!", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    ids, _ = server.asked[0]
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
