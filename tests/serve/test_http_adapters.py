"""Several adapters over one base by HTTP: chosen by the name of the model, answered in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from research.qwen.cli import serve
from research.qwen.decode.params import SamplingParams
from research.qwen.demo import demo_folder
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerState
from tests.lora_fixtures import saved_adapter
from tests.serve.running import error_of, serve_app

pytestmark = pytest.mark.mindspore
NAMES = ("qwen", "poet", "clerk")
PROMPTS = ("你是谁？", "Hello, who are you?")
BODY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerState]:
    """What ``serve --lora poet=... --lora clerk=...`` loads, with the demo model."""
    root = tmp_path_factory.mktemp("adapters")
    poet, clerk = (
        saved_adapter(root / name, demo_folder(), seed, 0.2) for seed, name in enumerate(NAMES[1:])
    )
    options = ["--lora", f"poet={poet}", "--lora", str(clerk), "--served-model-name", "qwen"]
    args = serve.build_parser().parse_args(
        [str(demo_folder()), "--device", "cpu", "--num-blocks", "64", *options]
    )
    engine, scheduler = serve.load(args)
    scheduler.start()
    try:
        assert scheduler.wait_ready(60)
        yield ServerState(serve.settings_from(args), engine, scheduler)
    finally:
        scheduler.close()


@pytest.fixture(scope="module")
def client(state: ServerState) -> Iterator[httpx.Client]:
    with serve_app(create_app(state)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def chat_text(client: httpx.Client, model: str, prompt: str) -> str:
    """The text of a streamed answer; every chunk carries the name that was asked for."""
    body = {**BODY, "model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    text = ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert chunk["model"] == model
                text += chunk["choices"][0]["delta"].get("content") or ""
    return text


def test_models_are_listed_with_their_parent(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("qwen", None),
        ("poet", "qwen"),
        ("clerk", "qwen"),
    ]
    assert client.get("/v1/models/poet").json() == cards[1]
    assert {card["max_model_len"] for card in cards} == {cards[0]["max_model_len"]}
    error = error_of(client.get("/v1/models/painter"), 404)
    assert error["code"] == "model_not_found"


def test_streams_of_all_models_at_once(client: httpx.Client, state: ServerState) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=BODY["max_tokens"])
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    alone = [
        state.engine.chat([{"role": "user", "content": prompt}], params, "" if name == "qwen" else name).text
        for name, prompt in asked
    ]
    assert len(set(alone[:3])) == 3 and "Qwen" in alone[0]
    before = state.scheduler.stats()
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda pair: chat_text(client, *pair), asked))
    assert together == alone
    stats = state.scheduler.stats()
    steps, tokens = stats.steps - before.steps, stats.generation_tokens - before.generation_tokens
    assert tokens > steps, "they did not run in one batch"


def test_completions_and_embeddings(client: httpx.Client, state: ServerState) -> None:
    texts, vectors = [], []
    for name in NAMES:
        body = {**BODY, "model": name, "prompt": PROMPTS[1], "logprobs": 1}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["model"] == name
        texts.append(tuple(answer["choices"][0]["logprobs"]["token_logprobs"]))
        answer = client.post("/v1/embeddings", json={"model": name, "input": PROMPTS[0]}).json()
        vectors.append(np.asarray(answer["data"][0]["embedding"]))
    assert len(set(texts)) == 3
    ids = state.tokenizer.encode(PROMPTS[0])
    for name, vector in zip(NAMES, vectors, strict=True):
        made = state.scheduler.call(
            lambda engine, name=name: engine.embed([ids], "" if name == "qwen" else name)
        ).result(20)
        assert np.allclose(vector, made[0], atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_names(client: httpx.Client, state: ServerState) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ):
        error = error_of(client.post(path, json={**body, "model": "painter"}), 404)
        assert "qwen, poet, clerk" in error["message"] and error["param"] == "model"
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).json()
    assert answer["model"] == "qwen", "without a name it is the base model"
    assert client.post("/tokenize", json={"prompt": "a", "model": "clerk"}).json()["count"] == 1
    assert [state.adapter_of(name) for name in NAMES] == ["", "poet", "clerk"]


def test_options(tmp_path: Path) -> None:
    parse = serve.build_parser().parse_args
    folder = tmp_path / "a=b"
    folder.mkdir()
    settings = serve.settings_from(parse(["--lora", "x=here", "--lora", str(folder), "--any-model"]))
    assert settings.adapters == ("x", "a=b")
    state = ServerState(settings)
    assert [state.check_model(name) for name in ("x", "other", None)] == ["x", "qwen-demo", "qwen-demo"]
    for argv, word in (
        (["--lora", "x=1", "--lora", "x=2"], "two adapters"),
        (["--lora", "x=1", "--served-model-name", "x"], "and an adapter's"),
    ):
        with pytest.raises(serve.ConfigError, match=word):
            serve.settings_from(parse(argv))
