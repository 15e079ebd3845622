"""Random bodies: a server never answers 5xx (but 503 and 501), errors are always in the envelope, and nothing leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.qwen.serve.app import create_app
from research.qwen.serve.protocol import ChatRequest, CompletionRequest
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import error_of, fake_engine, running_state, serve_app
from tests.serve.test_stream import eventually

pytestmark = pytest.mark.slow

TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: list[Any] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "你好"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
]
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 3, "stop": ["x"]},
    "/v1/completions": {"prompt": "你好", "max_tokens": 3, "logprobs": 1, "echo": True},
    "/v1/embeddings": {"input": ["你好", "a"]},
    "/tokenize": {"messages": MESSAGES[:2]},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": MESSAGES},
}
FIELDS = {
    "/v1/chat/completions": sorted(ChatRequest.model_fields),
    "/v1/completions": sorted(CompletionRequest.model_fields),
    "/v1/embeddings": ["input", "model", "encoding_format", "dimensions", "user"],
    "/tokenize": ["prompt", "messages", "tools", "tool_choice", "add_generation_prompt", "parse_special"],
    "/detokenize": ["tokens", "model"],
    "/apply-template": sorted(ChatRequest.model_fields),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NASTY: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 20, 21, 10**6, -(10**6), 2**31, 2**63, 2**64, -(2**63) - 1, 10**40),
        *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
        *(
            "",
            " ",
            "a",
            "auto",
            "none",
            "required",
            "text",
            "json_object",
            "\x00",
            "\ud83d",
            "😀" * 50,
            "\n" * 9,
        ),
        *("<|im_end|>", "<|endoftext|>", "a" * 3000, "({[", "[a-z]{1,99999}", "(a*)*b", '{"type":', "\\"),
        *(
            [],
            [[]],
            [[[]]],
            [None],
            [""],
            ["a", 1],
            [1, 2],
            [[1], [2, -3]],
            [10**30],
            ["x"] * 50,
            [{}],
            [[1, True]],
        ),
        *({}, {"": None}, {"1": 1}, {"1": float("nan")}, {"-1": 0}, {"99999999999": 1}, {"a": {"b": []}}),
        *({"type": "json_object"}, {"type": "json_schema"}, {"type": "text"}, {"type": "grammar"}),
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "foo", "$ref": "#/no"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
        {"json": SCHEMA, "regex": "a+"},
        {"regex": "a+"},
        {"choice": ["a", ""]},
        SCHEMA,
        {"$ref": "#"},
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "function": {"name": "\n", "parameters": {"type": 7}}},
        {"type": "function", "function": None},
        {"name_for_model": "f", "parameters": [{"name": "x"}]},
        {"role": "user"},
        {"role": "user", "content": {"text": "a"}},
        {"role": "tool", "content": "r", "tool_call_id": None},
        {"role": "assistant", "content": None, "tool_calls": [{}], "function_call": {"name": 1}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"include_usage": True, "continuous_usage_stats": True},
    ]
)
# Values that are right by themselves: what goes wrong, goes wrong together.
FITTING: dict[str, list[Any]] = {
    "temperature": [0, 1e-9, 1e-3, 1.0, 2.0],
    "top_p": [0, 1e-9, 0.5, 1],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 0.5, 1],
    "n": [1, 2, 5],
    "seed": [0, -1, 2**63 - 1],
    "stop": ["", "a", ["a", "你好"], [], ["<|im_end|>"]],
    "stop_token_ids": [[], [0, 816], list(range(1024))],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [0.01, 1, 100.0],
    "logit_bias": [{}, {"5": 100, "6": -100}, {str(token): -100 for token in range(820)}],
    "max_tokens": [0, 1, 9, 1000],
    "max_completion_tokens": [0, 1, 9],
    "min_tokens": [0, 1, 5],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [True, False],
    "bad_words": [["a"], ["你好", " "], []],
    "allowed_token_ids": [[5], [816], [1, 2, 3], []],
    "prompt_logprobs": [0, 1, 20],
    "truncate_prompt_tokens": [-1, 1, 5],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "request_id": ["r", "r r\n", "\ud83d"],
    "cache_salt": ["s", ""],
    "stream": [True],
    "stream_options": [{"include_usage": True, "continuous_usage_stats": True}],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    ],
    "guided_regex": ["[a-c]{2,4}", "你好|😀"],
    "guided_choice": [["a", "b"]],
    "logprobs": [True, 0, 1, 20],
    "top_logprobs": [0, 1, 20],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "parallel_tool_calls": [True, False],
    "tools": [[TOOL], [], [{**TOOL, "function": {**TOOL["function"], "strict": True}}]],
    "add_generation_prompt": [True, False],
    "continue_final_message": [True, False],
    "echo": [True, False],
    "best_of": [1, 3],
    "prompt": ["", "你好", ["a", ""], [1, 2], [[1], [2, 3]], "<|im_start|>"],
    "messages": [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}]],
    "input": ["a", [1, 2], [[1], [2, 3]]],
    "encoding_format": ["float", "base64"],
    "tokens": [[], [0], [816, 817, 5]],
}
JSON = st.recursive(
    NASTY | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
BOUNDED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.fixture(scope="module")
def state() -> Iterator[ServerState]:
    with running_state(fake_engine(max_length=1024), ServerSettings(default_max_tokens=8)) as state:
        yield state


@pytest.fixture(scope="module")
def server(state: ServerState) -> Iterator[httpx.Client]:
    with serve_app(create_app(state)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
        eventually(lambda: state.scheduler.stats().running + state.scheduler.stats().waiting == 0)
        assert state.scheduler.stats().blocks_used == 0, "a request has left blocks behind"
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def check(response: httpx.Response) -> None:
    """A success whose JSON is strict, or a refusal in the envelope."""
    if response.status_code >= 400:
        assert response.status_code < 500, response.text
        error_of(response, response.status_code)
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, last, end = response.text.split("\n\n")
        assert end == ""
        for event in events:
            assert "error" not in json.loads(event.removeprefix("data: "), parse_constant=_no_constant)
        if last != "data: [DONE]":  # fields that leave no token to choose, found out on the way
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["type"] == "invalid_request_error" and "every token is banned" in error["message"]
    else:
        json.loads(response.content.decode("utf-8"), parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def post(client: httpx.Client, path: str, body: object) -> httpx.Response:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    return client.post(path, content=content, headers={"content-type": "application/json"})


def changed(draw: Any, value: Any) -> Any:
    """The value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 3)) == 0:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    return draw(NASTY | JSON)


@st.composite
def bodies(draw: Any, path: str) -> Any:
    """A valid body with some fields more, and up to two that are not what they should be."""
    body: Any = VALID[path]
    known = sorted(set(FITTING) & set(FIELDS[path]))
    for name in draw(st.lists(st.sampled_from(known), max_size=5)):
        body = {**body, name: draw(st.sampled_from(FITTING[name]))}
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        if draw(st.booleans()):
            body = changed(draw, body)
            if not isinstance(body, dict):
                return body
        else:
            body = {**body, draw(st.sampled_from(FIELDS[path])): draw(NASTY)}
    return body


@pytest.mark.parametrize("path", VALID)
def test_valid_bodies_are_taken(server: httpx.Client, path: str) -> None:
    assert post(server, path, VALID[path]).status_code == 200


@pytest.mark.parametrize("path", VALID)
def test_changed_bodies(server: httpx.Client, path: str) -> None:
    count = 250 if path.startswith("/v1/c") else 80

    @settings(BOUNDED, max_examples=count)
    @given(bodies(path))
    def run(body: Any) -> None:
        check(post(server, path, body))

    run()


@pytest.mark.parametrize("path", VALID)
def test_every_field_with_every_nasty_value(server: httpx.Client, path: str) -> None:
    @settings(BOUNDED, max_examples=40)
    @given(st.sampled_from(FIELDS[path]), JSON)
    def run(name: str, value: Any) -> None:
        check(post(server, path, {**VALID[path], name: value}))

    run()


@pytest.mark.parametrize("path", VALID)
def test_bytes(server: httpx.Client, path: str) -> None:
    whole = json.dumps(VALID[path], ensure_ascii=False).encode()

    @settings(BOUNDED, max_examples=40)
    @given(st.integers(0, len(whole) - 1), st.integers(0, 4), st.binary(max_size=6))
    def run(place: int, lost: int, more: bytes) -> None:
        content = whole[:place] + more + whole[place + lost :]
        check(server.post(path, content=content, headers={"content-type": "application/json"}))

    run()
    for content in (
        b"",
        b"null",
        b"[]",
        b"7",
        b'"a"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"NaN",
    ):
        response = server.post(path, content=content, headers={"content-type": "application/json"})
        error_of(response, 400)


HEADERS = st.dictionaries(
    st.sampled_from(
        ["authorization", "x-request-id", "content-type", "accept", "origin", "host-x", "expect"]
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).map(str.strip),
    max_size=4,
)


@settings(BOUNDED, max_examples=60)
@given(
    method=st.sampled_from("GET POST PUT DELETE PATCH OPTIONS HEAD TRACE".split()),
    path=st.sampled_from(
        [*VALID, "/health", "/metrics", "/v1/models", "/v1/models/x", "/", "/version", "/props"]
    )
    | st.text("abc/.%?{}~é0", max_size=20).map(lambda text: "/" + text),
    headers=HEADERS,
)
def test_methods_paths_and_headers(
    server: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    response = server.request(method, path.replace("%", "%25"), headers=headers)
    assert response.status_code < 500
    if response.status_code >= 400 and method != "HEAD":
        error_of(response, response.status_code)
