"""/v1/embeddings: the same vectors in every form of asking, and running answers go on meanwhile."""

from __future__ import annotations

import base64
import threading

import httpx
import numpy as np
import pytest

from research.qwen.serve.app import create_app
from research.qwen.serve.embeddings import CALL_TOKENS, _batches
from research.qwen.serve.state import ServerState
from tests.serve.running import demo_tokenizer, fake_engine, running_state, serve_app

TOKENIZER = demo_tokenizer()
TEXT = "hello 你好"


def vectors(client: httpx.Client, given: object, **options: object) -> list[list[float]]:
    response = client.post("/v1/embeddings", json={"input": given, **options})
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "qwen")
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert {item["object"] for item in body["data"]} == {"embedding"}
    return [item["embedding"] for item in body["data"]]


def test_every_form_of_input(client: httpx.Client) -> None:
    ids = TOKENIZER.encode(TEXT)
    expected = vectors(client, TEXT)
    assert len(expected) == 1
    assert np.linalg.norm(expected[0]) == pytest.approx(1, abs=1e-6)
    assert vectors(client, [TEXT]) == vectors(client, ids) == vectors(client, [ids]) == expected
    assert vectors(client, [TEXT, "other", ids])[::2] == expected * 2


def test_the_engine_gives_them(client: httpx.Client, fake_state: ServerState) -> None:
    ids = [[1, 2, 3], [4], list(range(5, 80))]
    made = fake_state.scheduler.call(lambda engine: engine.embed(ids)).result(20)
    np.testing.assert_array_equal(np.asarray(vectors(client, ids), np.float32), made)


def test_base64_is_little_endian_float32(client: httpx.Client) -> None:
    numbers = vectors(client, ["a", TEXT], encoding_format="float")
    packed = client.post("/v1/embeddings", json={"input": ["a", TEXT], "encoding_format": "base64"}).json()
    for item, expected in zip(packed["data"], numbers, strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), expected)


def test_usage(client: httpx.Client) -> None:
    usage = client.post("/v1/embeddings", json={"input": [[1, 2, 3], [4]]}).json()["usage"]
    assert usage == {"prompt_tokens": 4, "total_tokens": 4}


def test_control_tokens_in_a_text_are_text(client: httpx.Client) -> None:
    plain = TOKENIZER.encode("<|endoftext|>")
    assert vectors(client, "<|endoftext|>") == vectors(client, plain) != vectors(client, [TOKENIZER.eod_id])


def test_dimensions_are_those_of_the_model(client: httpx.Client) -> None:
    size = len(vectors(client, "a")[0])
    assert len(vectors(client, "a", dimensions=size)[0]) == size
    response = client.post("/v1/embeddings", json={"input": "a", "dimensions": size + 1})
    assert response.status_code == 400 and response.json()["error"]["param"] == "dimensions"


@pytest.mark.parametrize(
    "given", [[], "", [""], [[]], ["a", [1]], None, 5, {"a": 1}, [True], [[1.0]], ["a", 1], [[-1]], [10**9]]
)
def test_bad_inputs(client: httpx.Client, given: object) -> None:
    response = client.post("/v1/embeddings", json={"input": given})
    if given == ["a", [1]]:  # texts and ids may stand side by side
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("input")


def test_inputs_go_in_bounded_calls() -> None:
    prompts = [[0] * size for size in (5, CALL_TOKENS - 5, 1, CALL_TOKENS + 7, 3, 4)]
    sizes = [[len(ids) for ids in batch] for batch in _batches(prompts)]
    assert sizes == [[5, CALL_TOKENS - 5], [1], [CALL_TOKENS + 7], [3, 4]]


@pytest.mark.slow
def test_many_at_once_beside_a_running_answer() -> None:
    with (
        running_state(fake_engine(num_blocks=1024, max_length=2000)) as state,
        serve_app(create_app(state)) as url,
    ):
        wish = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "seed": 1}
        alone = httpx.post(f"{url}/v1/completions", json=wish, timeout=30).json()["choices"]
        answers: list[object] = []

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=wish, timeout=30).json()["choices"])

        thread = threading.Thread(target=ask)
        thread.start()
        with httpx.Client(base_url=url, timeout=30) as client:
            first = vectors(client, [[place] * 50 for place in range(1, 30)])
            assert vectors(client, [[place] * 50 for place in range(1, 30)]) == first
        thread.join()
        assert answers == [alone]
