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
    server.fresh("Hello, 你好 🙂!")


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


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("hi", 1),
        (["hi"], 1),
        (["hi", "ho", "hu"], 3),
        ([1, 2, 3], 1),
        ([[1, 2, 3], [4], [5, 6, 7, 8]], 3),
        (["hi", [1, 2]], 2),
    ],
)
def test_prompts_of_all_forms(server: Script, prompt: object, count: int) -> None:
    body = server.complete(prompt=prompt, max_tokens=100)
    assert [choice["index"] for choice in body["choices"]] == list(range(count))
    assert {choice["text"] for choice in body["choices"]} == {server.lm.reply}
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids, _ in server.asked)


def test_choices_are_ordered_by_prompt(server: Script) -> None:
    server.lm.reply = lambda prompt: f"<{prompt}>"
    body = server.complete(prompt=["a", "b", "c"], n=2, max_tokens=100)
    assert [choice["text"] for choice in body["choices"]] == ["<a>", "<a>", "<b>", "<b>", "<c>", "<c>"]
    assert [choice["index"] for choice in body["choices"]] == list(range(6))


@pytest.mark.parametrize("prompt", [None, "", [""]])
def test_no_prompt_is_the_start_of_a_document(server: Script, prompt: object) -> None:
    server.complete(prompt=prompt, max_tokens=1)
    assert server.asked[0][0] == [server.lm.tokenizer.eod_id]


def test_names_of_control_tokens_are_text(server: Script) -> None:
    server.complete(prompt="<|im_end|><|endoftext|>")
    assert max(server.asked[0][0]) < server.lm.tokenizer.eod_id


@pytest.mark.slow
def test_a_list_longer_than_the_queue_is_served() -> None:
    with scripted_server(lambda prompt: prompt.upper(), max_queue=4) as script:
        prompts = [f"p {number}" for number in range(80)]
        body = script.complete(prompt=prompts, max_tokens=20)
        assert [choice["text"] for choice in body["choices"]] == [prompt.upper() for prompt in prompts]
        chunks = script.events("/v1/completions", {"prompt": prompts, "max_tokens": 20})
    texts: dict[int, str] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert [texts[index] for index in range(80)] == [prompt.upper() for prompt in prompts]


def test_stop_and_echo(server: Script) -> None:
    body = server.complete(prompt="你 hi", echo=True, max_tokens=50, stop="好")
    assert body["choices"][0]["text"] == "你 hiHello, 你" and body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None


def test_prompt_only(server: Script) -> None:
    body = server.complete(max_tokens=0, echo=True)
    assert body["choices"][0]["text"] == "hi" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert server.complete(max_tokens=0)["choices"][0]["text"] == ""


def test_best_of_returns_the_likeliest() -> None:
    from tests.serve.running import fake_engine, running_state, serve_app

    with running_state(fake_engine()) as state:
        import httpx

        from research.qwen.serve.app import create_app

        with serve_app(create_app(state)) as url, httpx.Client(base_url=url, timeout=60) as client:
            body = {"prompt": "x", "seed": 1, "temperature": 1.5, "max_tokens": 5, "ignore_eos": True}
            four = client.post("/v1/completions", json={**body, "n": 4, "logprobs": 0}).json()["choices"]
            best = client.post("/v1/completions", json={**body, "n": 2, "best_of": 4}).json()
    means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) for choice in four}
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"]["completion_tokens"] == 20


def test_token_ids_are_returned_on_request(server: Script) -> None:
    body = server.complete(prompt=[1, 2, 3], return_token_ids=True, max_tokens=50)
    tokenizer = server.lm.tokenizer
    [choice] = body["choices"]
    assert choice["prompt_token_ids"] == [1, 2, 3]
    assert choice["token_ids"] == [*tokenizer.encode(server.lm.reply), tokenizer.im_end_id]


def test_truncated_prompts(server: Script) -> None:
    server.complete(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2)
    assert server.asked[0][0] == [3, 4]


def test_a_default_length_is_cut_by_the_context_and_a_wish_refused(server: Script) -> None:
    ids = [1] * (server.lm.max_length - 4)
    server.lm.reply = "a b c d e f g h"
    assert server.complete(prompt=ids)["choices"][0]["finish_reason"] == "length"
    error = server.refusal("/v1/completions", {"prompt": ids, "max_tokens": 5})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert str(server.lm.max_length) in error["message"] and str(len(ids)) in error["message"]
    assert server.complete(prompt=ids, max_tokens=4)["usage"]["total_tokens"] == server.lm.max_length


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [[1, "a"]]}, "prompt[0]"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [10**9]]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["x"] * 3000}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt_logprobs": 50}, "prompt_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"temperature": float(10**9), "top_p": -1}, "top_p"),
    ],
)
def test_refused(server: Script, body: dict, param: str) -> None:
    error = server.refusal("/v1/completions", {"prompt": "hi", **body})
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert server.asked == [], "nothing of it may run"
