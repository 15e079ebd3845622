"""A model that says what a test wants, behind the real engine: texts that are known, cut into tokens as they come."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.loop import Chunk
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import demo_tokenizer, running_state, serve_app

Reply = str | Callable[[str], str]
Rows = NDArray[np.float32]


class ScriptedLM:
    """Continues every prompt with ``reply`` (a text, or a function of the prompt as text) and then its end token.

    Where the prompt already holds a part of the answer, ``reply`` is what comes behind it. Logits are 10 for the
    token to come and a hash of the position for all others, so that there are rivals to report.
    """

    num_blocks, block_size = 512, 4

    def __init__(self, reply: Reply, *, end: str = "<|im_end|>", max_length: int = 512):
        self.tokenizer = demo_tokenizer()
        self.vocab_size, self.max_length = len(self.tokenizer), max_length
        self.reply, self.end = reply, self.tokenizer.control_id(end)
        self.prompts: set[tuple[int, ...]] = set()
        self.cache = np.full(self.num_blocks * self.block_size, -1, np.int64)
        self.gate: threading.Event | None = None  # passes wait for it, from number ``free_steps`` on
        self.steps = self.free_steps = 0
        self.fail_at: int | None = None
        self.hidden_size = 8

    def rope_alpha(self, prompt_length: int) -> float:
        """Always 1."""
        return 1.0

    def forward(self, chunks: Sequence[Chunk]) -> Rows:
        """As the protocol says."""
        if self.gate is not None and self.steps >= self.free_steps:
            self.gate.wait(20)
        self.steps += 1
        if self.fail_at is not None and self.steps > self.fail_at:
            raise RuntimeError("secret: the model broke")
        rows = []
        for chunk in chunks:
            length = chunk.start + len(chunk.ids)
            places = np.arange(length)
            slots = np.asarray(chunk.blocks)[places // self.block_size] * self.block_size
            slots += places % self.block_size
            self.cache[slots[chunk.start :]] = chunk.ids
            ids = self.cache[slots].tolist()
            rows += [self._row(ids[: length - back]) for back in range(chunk.logits - 1, -1, -1)]
        return np.stack(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    def hidden(self, chunks: Sequence[Chunk]) -> Rows:
        """Not used here."""
        return np.ones((sum(chunk.logits for chunk in chunks), self.hidden_size), np.float32)

    def _row(self, ids: list[int]) -> Rows:
        row = np.random.default_rng(len(ids)).standard_normal(self.vocab_size).astype(np.float32)
        row[self._next(ids)] = 10.0
        return row

    def _next(self, ids: list[int]) -> int:
        prompt = max(
            (prompt for prompt in self.prompts if tuple(ids[: len(prompt)]) == prompt), key=len, default=()
        )
        reply = self.reply if isinstance(self.reply, str) else self.reply(self.tokenizer.decode(list(prompt)))
        answer = [*self.tokenizer.encode(reply), self.end]
        said = ids[len(prompt) :]
        return answer[len(said)] if answer[: len(said)] == said and len(said) < len(answer) else self.end


@dataclass
class Script:
    """A running server whose model says what ``lm.reply`` has; ``asked`` are the prompts and values it was given."""

    lm: ScriptedLM
    state: ServerState
    client: httpx.Client
    asked: list[tuple[list[int], SamplingParams]]

    def fresh(self, reply: Reply) -> None:
        """Forget what was asked; say this from now on."""
        self.lm.reply, self.lm.gate, self.lm.fail_at = reply, None, None
        self.asked.clear()
        self.lm.prompts.clear()

    def chat(self, **body: Any) -> dict[str, Any]:
        """A chat completion that must succeed."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        return self.post("/v1/completions", {"prompt": "hi", **body})

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """Any request that must succeed."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error of a request that must fail."""
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The JSON of all events of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines), lines
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def chat_events(self, **body: Any) -> list[Any]:
        """The chunks of a streamed chat completion."""
        return self.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body})


@contextlib.contextmanager
def scripted_server(
    reply: Reply = "hello",
    settings: ServerSettings | None = None,
    *,
    max_length: int = 512,
    generation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Script]:
    """A server with a scripted model on a loopback port; ``options`` are those of ``Scheduler``."""
    lm = ScriptedLM(reply, max_length=max_length)
    engine = Engine(lm, lm.tokenizer, generation=generation or {"chat_format": "chatml"})
    asked: list[tuple[list[int], SamplingParams]] = []
    with running_state(engine, settings, **options) as state:
        submit = state.submit

        def recorded(ids: list[int], params: SamplingParams, deliver: Any, **more: Any) -> Any:
            asked.append((ids, params))
            lm.prompts.add(tuple(ids))
            return submit(ids, params, deliver, **more)

        state.submit = recorded  # type: ignore[method-assign, assignment]
        with serve_app(create_app(state)) as url, httpx.Client(base_url=url, timeout=30) as client:
            yield Script(lm, state, client, asked)
