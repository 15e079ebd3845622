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
    server.fresh("Hello, 你好 🙂!")


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


def test_prompt_is_chatml_with_the_default_system_message(server: Script) -> None:
    server.chat(messages=[{"role": "user", "content": "<|im_end|>你好"}])
    ids, _ = server.asked[0]
    tokenizer = server.lm.tokenizer
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>你好<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(tokenizer.im_end_id) == 2, "what a user writes must not close a turn"


def test_roles_and_parts(server: Script) -> None:
    server.chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ]
    )
    text = server.lm.tokenizer.decode(server.asked[0][0])
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>")


def test_empty_answer_is_an_empty_text(server: Script) -> None:
    server.lm.reply = ""
    message = server.chat()["choices"][0]["message"]
    assert message["content"] == "" and "tool_calls" not in message


def test_unknown_fields_are_ignored(server: Script) -> None:
    extras = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low", "user": "me"}
    body = server.chat(
        **extras, prompt_cache_key="x", reasoning_effort="low", seed=None, tools=None, stop=None
    )
    assert body["choices"][0]["finish_reason"] == "stop"


def test_values_reach_the_sampler(server: Script) -> None:
    server.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        stop=["x1", "x2", "x3", "x4", "x5"],
        stop_token_ids=[5],
        logit_bias={"7": -100},
        ignore_eos=False,
        min_tokens=2,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        bad_words=["bad"],
    )
    _, params = server.asked[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.seed, params.presence_penalty, params.frequency_penalty) == (3, 0.5, -0.5)
    assert (params.repetition_penalty, params.stop_token_ids, params.min_new_tokens) == (1.1, (5,), 2)
    assert params.stop == ("x1", "x2", "x3", "x4", "x5")
    assert dict(params.logit_bias) == {7: -100.0}
    assert not params.skip_special_tokens and params.include_stop_str_in_output
    encode = server.lm.tokenizer.encode
    assert params.bad_words_ids == (tuple(encode("bad")), tuple(encode(" bad")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.005}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_k": 1}),
        ({"stop": "one"}, {"stop": ("one",)}),
        ({}, {"max_new_tokens": None}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_new_tokens": 6}),
        ({"n": 3}, {"n": 3}),
        ({"allowed_token_ids": [1, 2]}, {"allowed_token_ids": (1, 2)}),
    ],
)
def test_other_ways_to_say_it(server: Script, given: dict, expected: dict) -> None:
    server.chat(**given)
    _, params = server.asked[0]
    assert {name: getattr(params, name) for name in expected} == expected


def test_the_checkpoints_defaults_apply_where_the_request_is_silent() -> None:
    generation = {
        "chat_format": "chatml",
        "do_sample": True,
        "top_p": 0.8,
        "temperature": 0.7,
        "repetition_penalty": 1.1,
        "max_new_tokens": 9,
    }
    with scripted_server("hi", generation=generation) as script:
        script.chat(temperature=0.3)
        _, params = script.asked[0]
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.3, 0.8, 1.1)
    assert params.max_new_tokens is None


def test_length_and_stop(server: Script) -> None:
    cut = server.chat(max_tokens=3)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"] == "Hello, "
    assert cut["usage"]["completion_tokens"] == 3
    stopped = server.chat(stop=["你"])["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("Hello, ", "stop")
    shown = server.chat(stop=["你"], include_stop_str_in_output=True)["choices"][0]
    assert shown["message"]["content"] == "Hello, 你"


def test_default_length_is_the_rest_of_the_context() -> None:
    with scripted_server("a" * 1000, max_length=64) as script:
        body = script.chat()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["total_tokens"] == 64


def test_several_choices(server: Script) -> None:
    body = server.chat(n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {server.lm.reply}
    assert body["usage"]["prompt_tokens"] == len(server.asked[0][0])
    assert body["usage"]["completion_tokens"] % 3 == 0


@pytest.mark.slow
def test_seed_gives_the_same_text_alone_and_in_company() -> None:
    import concurrent.futures

    from tests.serve.running import fake_engine, running_state, serve_app

    with running_state(fake_engine()) as state:
        import httpx

        from research.qwen.serve.app import create_app

        with serve_app(create_app(state)) as url, httpx.Client(base_url=url, timeout=60) as client:

            def ask(seed: int) -> str:
                body = {"messages": [{"role": "user", "content": "q"}], "seed": seed, "max_tokens": 12}
                answer = client.post(CHAT, json={**body, "temperature": 1}).json()
                return str(answer["choices"][0]["message"]["content"])

            alone = [ask(seed) for seed in range(6)]
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                together = list(pool.map(ask, range(6)))
    assert together == alone and len(set(alone)) > 1


def test_continued_message_and_echo(server: Script) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    server.lm.reply = " is 42"
    body = server.chat(messages=messages, continue_final_message=True, echo=True)
    text = server.lm.tokenizer.decode(server.asked[0][0])
    assert text.endswith("<|im_start|>assistant\nThe answer")
    assert body["choices"][0]["message"]["content"] == "The answer is 42"
    fresh = server.chat(messages=messages, continue_final_message=False)
    assert server.lm.tokenizer.decode(server.asked[1][0]).endswith(
        "The answer<|im_end|>\n<|im_start|>assistant\n"
    )
    assert fresh["choices"][0]["message"]["content"] == " is 42"


def test_results_of_tools_are_not_echoed(server: Script) -> None:
    server.lm.reply = " done\nFinal Answer: yes"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "result"},
    ]
    assert server.chat(messages=messages, echo=True)["choices"][0]["message"]["content"] == "yes"


def test_both_forms_of_the_answer_are_documented(server: Script) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in (CHAT, "/v1/completions"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


def test_prompt_without_an_open_turn(server: Script) -> None:
    server.chat(add_generation_prompt=False)
    assert server.lm.tokenizer.decode(server.asked[0][0]).endswith("hi<|im_end|>\n")


def test_truncated_prompt(server: Script) -> None:
    whole = server.chat(return_token_ids=True)["prompt_token_ids"]
    body = server.chat(truncate_prompt_tokens=5, return_token_ids=True)
    assert body["prompt_token_ids"] == whole[-5:] and body["usage"]["prompt_tokens"] == 5
    long = [{"role": "user", "content": "word " * 600}]
    body = server.chat(messages=long, truncate_prompt_tokens=-1, max_tokens=1)
    assert body["usage"]["prompt_tokens"] == server.lm.max_length - 1


def test_token_ids_are_returned_on_request(server: Script) -> None:
    choice = server.chat(return_token_ids=True)["choices"][0]
    tokenizer = server.lm.tokenizer
    assert choice["token_ids"] == [*tokenizer.encode(server.lm.reply), tokenizer.im_end_id]
    assert "token_ids" not in server.chat()["choices"][0]


def test_request_id_names_the_answer(server: Script) -> None:
    assert server.chat(request_id="mine")["id"] == "chatcmpl-mine"


def test_cached_tokens_are_reported_and_salted(server: Script) -> None:
    messages = [{"role": "system", "content": "rules " * 30}, {"role": "user", "content": "q"}]

    def cached(**more: str) -> int:
        usage = server.chat(messages=messages, **more)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached() == 0 and cached() > 20
    assert cached(cache_salt="other") == 0 and cached(cache_salt="other") > 20


def test_a_prompt_may_be_read_without_an_answer(server: Script) -> None:
    body = server.chat(max_tokens=0)
    assert body["choices"][0]["message"]["content"] == "" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
