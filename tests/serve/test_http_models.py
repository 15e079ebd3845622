"""/v1/models, /version, and the token routes that evaluation clients use."""

from __future__ import annotations

import httpx
import pytest

from research.qwen import __version__
from research.qwen.messages import Message
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings, ServerState
from research.qwen.text import chatml
from tests.serve.running import demo_tokenizer, error_of, fake_client, fake_engine, serve_app

TOKENIZER = demo_tokenizer()


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    card = listed["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("qwen", "model", 512)
    assert isinstance(card["created"], int) and isinstance(card["owned_by"], str)
    assert client.get("/v1/models/qwen").json() == card
    assert client.get("/version").json() == {"version": __version__}
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200


def test_several_names_and_names_with_slashes() -> None:
    with fake_client(ServerSettings(model_names=("Qwen/Qwen-7B-Chat", "gpt-4"))) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [
            "Qwen/Qwen-7B-Chat",
            "gpt-4",
        ]
        assert client.get("/v1/models/Qwen/Qwen-7B-Chat").json()["root"] == "Qwen/Qwen-7B-Chat"
        assert client.post("/v1/embeddings", json={"model": "gpt-4", "input": "a"}).json()["model"] == "gpt-4"
        error_of(client.get("/v1/models/"), 404)


def test_any_name_can_be_allowed() -> None:
    state = ServerState(ServerSettings(any_model=True), fake_engine())
    assert [state.check_model(name) for name in (None, "", "qwen", "gpt-4")] == ["qwen"] * 4


TEXTS = ("", "hello 你好", "a😀b", "<|im_start|>user", "two\n\nlines")


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(client: httpx.Client, text: str) -> None:
    body = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == TOKENIZER.encode(text, allowed_special="all")
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 512)
    assert len(body["token_strs"]) == body["count"]
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}
    assert client.post("/v1/tokenize", json={"prompt": text}).json()["tokens"] == body["tokens"]


def test_control_tokens_in_a_prompt(client: httpx.Client) -> None:
    body = {"prompt": "<|endoftext|>", "add_special_tokens": False}
    assert client.post("/tokenize", json=body).json()["tokens"] == [TOKENIZER.eod_id]
    plain = client.post("/tokenize", json={**body, "parse_special": False}).json()["tokens"]
    assert plain == TOKENIZER.encode("<|endoftext|>") and TOKENIZER.eod_id not in plain


def test_broken_characters_have_names(client: httpx.Client) -> None:
    body = client.post("/tokenize", json={"prompt": "龘<|im_end|>", "return_token_strs": True}).json()
    assert body["token_strs"][-1] == "<|im_end|>"
    named = [name for name in body["token_strs"] if name.startswith("bytes:\\x")]
    assert named, "the demo vocabulary has no whole token for this character"
    assert client.post("/tokenize", json={"prompt": "a"}).json()["token_strs"] is None


def test_messages_become_the_prompt_of_a_chat(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "<|im_end|> 你好"}]
    body = client.post("/tokenize", json={"messages": messages}).json()
    turns = [Message("system", chatml.DEFAULT_SYSTEM), Message("user", "<|im_end|> 你好")]
    assert body["tokens"] == chatml.render(turns, TOKENIZER)
    assert body["tokens"].count(TOKENIZER.im_end_id) == 2, "what a user writes ends no turn"
    chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == body["count"]
    shown = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert shown == chatml.render_text(turns)
    closed = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert closed["tokens"] == chatml.render(turns, TOKENIZER, add_generation_prompt=False)


def test_tools_are_part_of_the_prompt(client: httpx.Client) -> None:
    function = {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": function}],
    }
    assert "look_up" in client.post("/apply-template", json=body).json()["prompt"]
    chat = client.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()
    assert client.post("/tokenize", json=body).json()["count"] == chat["usage"]["prompt_tokens"]


BAD = {
    "neither": ("/tokenize", {}, "prompt"),
    "both": ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
    "no messages": ("/tokenize", {"messages": []}, "messages"),
    "role": ("/tokenize", {"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role"),
    "content": ("/apply-template", {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    "text for ids": ("/detokenize", {"tokens": "abc"}, "tokens"),
    "half a token": ("/detokenize", {"tokens": [1, 2.5]}, "tokens[1]"),
}


@pytest.mark.parametrize(("path", "body", "param"), BAD.values(), ids=BAD.keys())
def test_bad_requests(client: httpx.Client, path: str, body: object, param: str) -> None:
    assert error_of(client.post(path, json=body), 400)["param"] == param


@pytest.mark.parametrize("token", [-1, len(TOKENIZER), 10**30])
def test_ids_outside_the_vocabulary(client: httpx.Client, token: int) -> None:
    assert "vocabulary" in error_of(client.post("/detokenize", json={"tokens": [token]}), 400)["message"]


def test_tokenizer_info(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == info["pad_token"] == "<|endoftext|>"
    assert info["bos_token"] is None
    assert info["tokenizer_class"] == "QWenTokenizer"
    assert "<|im_start|>" in info["chat_template"]
    answer = client.post("/tokenize", json={"prompt": info["eos_token"]}).json()
    assert answer["tokens"] == [info["eos_token_id"]]
    assert client.get("/props").json()["default_generation_settings"] == {"n_ctx": 512}


def test_a_model_without_a_vocabulary() -> None:
    engine = fake_engine()
    engine.tokenizer = None
    with serve_app(create_app(ServerState(ServerSettings(), engine))) as url:
        for response in (
            httpx.post(f"{url}/tokenize", json={"prompt": "a"}),
            httpx.get(f"{url}/tokenizer_info"),
        ):
            assert "token ids" in error_of(response, 400)["message"]
