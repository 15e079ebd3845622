"""Tokenizer, model and decoding as one object: prompts and messages in, text and deltas out.

Many requests may run at once, from one thread or several: whoever waits for a token drives the shared loop and hands
the others theirs. What the beginning of a prompt needs is found in the cache if it was computed before. Imports neither
MindSpore nor MindFormers; ``from_pretrained`` loads the model behind it lazily.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from research.qwen.answers import Request, Requests, Result, Score, as_choice
from research.qwen.decode.loop import Chunk, GenerationLoop, LanguageModel
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import LogitsError, PromptError, RequestError
from research.qwen.messages import Delta, Message
from research.qwen.prompts import Prompt, as_list, as_message, find_tokenizer
from research.qwen.text import chatml
from research.qwen.text.tokenizer import QwenTokenizer

SCORE_CHUNK = 256  # rows of logits held at once while scoring: 256 x 151936 float32 = 156 MB
EMBED_CHUNK = 64  # tokens between which other work may go on

NO_VOCABULARY = (
    "This model was loaded without one: put its qwen.tiktoken beside the checkpoint, name it (vocab_file), set "
    "QWEN_TIKTOKEN, or pip install dashscope, which ships the published file; token ids work without"
)
T = TypeVar("T")


class Engine:
    """A loaded model with its vocabulary and the checkpoint's own generation defaults.

    Args:
        lm: the language model; ``from_pretrained`` makes one.
        tokenizer: None works too: prompts are then ids, and ``text`` stays empty.
        generation: the checkpoint's generation_config as a mapping; it gives the defaults of ``params=None``.
        eos_ids: ids that end an answer, if not to be derived from tokenizer and chat format.
        max_batch, prefill_chunk, mixed_chunk, use_cache, prefix_caching: see ``GenerationLoop``. Whoever changes the
            weights of a model in use calls ``forget_prefixes``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: QwenTokenizer | None = None,
        *,
        generation: Mapping[str, Any] | None = None,
        eos_ids: Sequence[int] | None = None,
        max_batch: int = 16,
        prefill_chunk: int = 512,
        mixed_chunk: int | None = None,
        use_cache: bool = True,
        prefix_caching: bool = True,
    ):
        self.lm, self.tokenizer = lm, tokenizer
        self.generation = dict(generation or {})
        self.chat_format = str(self.generation.get("chat_format", "raw"))
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else self._default_eos()
        self._loop = GenerationLoop(
            lm,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            mixed_chunk=mixed_chunk,
            use_cache=use_cache,
            prefix_caching=prefix_caching,
            isolate=True,
        )
        self.requests = Requests(self._loop, tokenizer, self.eos_ids)
        self._lock = self.requests.lock

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        backend: str | None = None,
        *,
        lm_head_dtype: str | None = None,
        embedding_dtype: str | None = None,
        kv_dtype: str | None = None,
        activations: str | None = None,
        config: str | Path | None = None,
        vocab_file: str | Path | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        threads: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> Engine:
        """Load a Hugging Face folder, a converted folder, or a .ckpt / .safetensors file with its YAML beside it.

        Args:
            device: cpu, ascend, or auto (Ascend if MindSpore finds one).
            dtype: of the weights: None as stored; int8, int4, int4-g64-asym, ... quantise a plain checkpoint while it
                loads; float32 is as stored with nothing rounded on the way. On ascend the dtype of the computation.
            lm_head_dtype, embedding_dtype, kv_dtype, activations: see model.precision.Precision.
            backend: cpu, reference or ascend; None follows the device.
            config: YAML to read the model from instead of config.json.
            num_blocks, block_size: size of the paged KV cache; None fits the context and the memory at hand.
            adapters: LoRA adapters by name (folders as peft writes them) that share the weights; ``adapter`` of a
                request chooses one.
            options: max_batch, prefill_chunk, mixed_chunk, use_cache, prefix_caching as for Engine.
        Raises:
            ConfigError, CheckpointError, VocabularyError, KernelError: each says what is wrong and how to mend it.
        """
        from research.qwen.model.opening import open_model
        from research.qwen.model.precision import Precision

        precision = Precision(dtype, lm_head_dtype, embedding_dtype, kv_dtype, activations)
        opened = open_model(
            path, device, backend, config, precision, num_blocks, block_size, threads, adapters
        )
        tokenizer = find_tokenizer(vocab_file or opened.vocab_file, opened.folder, opened.runtime.vocab_size)
        return cls(opened.runtime, tokenizer, generation=opened.generation, eos_ids=opened.eos_ids, **options)

    def _default_eos(self) -> tuple[int, ...]:
        configured = self.generation.get("eos_token_id")
        listed = [configured] if isinstance(configured, int) else list(configured or [])
        if self.tokenizer is not None:
            listed += chatml.stop_ids(self.tokenizer, self.chat_format)
        return tuple(dict.fromkeys(int(i) for i in listed if 0 <= int(i) < self.lm.vocab_size))

    def default_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's own generation defaults as SamplingParams, with some fields changed."""
        known = self.generation
        values: dict[str, Any] = {"temperature": 0.0}
        if known.get("do_sample"):
            values["temperature"] = float(known.get("temperature") or 1.0)
            values["top_k"] = int(known.get("top_k") or 0)
            values["top_p"] = float(known.get("top_p") or 1.0)
        values["repetition_penalty"] = float(known.get("repetition_penalty") or 1.0)
        values["max_new_tokens"] = int(known.get("max_new_tokens") or 512)
        return SamplingParams(**{**values, **changes})

    # ---- asking ----

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may choose."""
        return tuple(getattr(self.lm, "adapters", ()))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        adapter: str | Sequence[str] = "",
    ) -> list[Result]:
        """Complete prompts (texts, or lists of ids) together; results in the order of the prompts.

        ``adapter``: name of the one to use, or one for each prompt; empty is the base model. Raises PromptError for an
        empty or too long prompt or ids outside the vocabulary, RequestError for an unknown adapter, before anything
        runs.
        """
        params = params or self.default_params()
        encoded = [self._encode(prompt) for prompt in as_list(prompts)]
        names = [adapter] * len(encoded) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(encoded):
            raise RequestError(f"{len(names)} adapters for {len(encoded)} prompts; give one, or one for each")
        requests = self._submit(encoded, params, names)
        try:
            return [self._collect(request, params) for request in requests]
        finally:
            for request in requests:  # after an interruption the others must not go on
                self.requests.close(request)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: str = ""
    ) -> Iterator[Delta]:
        """Complete one prompt, yielding deltas of whole characters; the last one has finish reason and usage.

        Closing the iterator early cancels the request and frees its cache.
        """
        params = params or self.default_params()
        return self._deltas(self._submit([self._encode(prompt)], params, [adapter])[0])

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = None,
        adapter: str = "",
    ) -> Result:
        """Answer a conversation (Message values, or mappings with role and content).

        Without a system message the published default is used. Raises PromptError if the prompt is too long.
        """
        return self.generate([self.render(messages)], params, adapter)[0]

    def chat_stream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = None,
        adapter: str = "",
    ) -> Iterator[Delta]:
        """Like ``chat``, as a stream of deltas."""
        return self.stream(self.render(messages), params, adapter)

    def render(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Prompt ids of a conversation in ChatML, ready for the assistant's answer."""
        if self.tokenizer is None:
            raise RequestError(f"chat needs a vocabulary. {NO_VOCABULARY}")
        turns = [as_message(message, place) for place, message in enumerate(messages)]
        if not turns:
            raise PromptError("messages is empty; give at least one user message")
        if turns[0].role != "system":
            turns.insert(0, Message("system", chatml.DEFAULT_SYSTEM))
        return chatml.render(turns, self.tokenizer)

    def logits(self, ids: Sequence[int], adapter: str = "") -> NDArray[np.float32]:
        """(T, V) float32 logits of one pass over ``ids``."""
        return np.concatenate([rows for rows in self._passes(self._check_ids(list(ids)), adapter)])

    def score(self, prompt: Prompt, continuation: Prompt | None = None, adapter: str = "") -> Score:
        """Log-probabilities of a continuation after a prompt; without one, of the prompt after its first token."""
        head = self._encode(prompt)
        tail = self._encode(continuation) if continuation is not None else head[1:]
        ids = head + tail if continuation is not None else head
        if not tail:
            raise PromptError("nothing to score: give two tokens or more, or a continuation")
        first = len(ids) - len(tail)
        logprobs, greedy, start = [], [], 0
        for rows in self._passes(self._check_ids(ids), adapter):
            for place in range(max(start, first - 1), min(start + len(rows), len(ids) - 1)):
                row, target = rows[place - start].astype(np.float64), ids[place + 1]
                top = row.max()
                logprobs.append(row[target] - top - np.log(np.exp(row - top).sum()))
                greedy.append(int(row.argmax()) == target)
            start += len(rows)
        return Score(tail, np.asarray(logprobs), np.asarray(greedy, np.bool_))

    # ---- prompts ----

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(f"a text prompt needs a vocabulary. {NO_VOCABULARY}")
            return self.tokenizer.encode(prompt)
        return self._check_types(prompt)

    @staticmethod
    def _check_types(ids: Sequence[int]) -> list[int]:
        try:
            whole = [int(i) for i in ids]
        except (TypeError, ValueError):
            raise PromptError("a prompt is a text or a list of token ids") from None
        if any(a != b for a, b in zip(whole, ids, strict=True)):
            raise PromptError("token ids must be integers")
        return whole

    def _check_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise PromptError("the prompt is empty; give at least one token")
        for i in ids:
            if not 0 <= i < self.lm.vocab_size:
                raise PromptError(f"token id {i} is outside the vocabulary of {self.lm.vocab_size} rows")
        if len(ids) > self.lm.max_length:
            raise PromptError(f"the prompt has {len(ids)} tokens, the context holds {self.lm.max_length}")
        return ids

    # ---- running ----

    def forget_prefixes(self) -> None:
        """Compute the beginning of every later prompt anew."""
        with self._lock:
            self._loop.pool.forget()

    def _submit(
        self, encoded: Sequence[list[int]], params: SamplingParams, adapters: Sequence[str]
    ) -> list[Request]:
        asked = list(zip(encoded, adapters, strict=True))
        checked = [self.requests.check(ids, params, name) for ids, name in asked]  # all or nothing
        return [
            self.requests.open(ids, params, adapter=name) for ids, name in zip(checked, adapters, strict=True)
        ]

    def _deltas(self, request: Request) -> Iterator[Delta]:
        try:
            while True:
                with self._lock:
                    if not request.inbox and request.running:
                        self.requests.pump()
                    pending = [request.inbox.popleft() for _ in range(len(request.inbox))]
                    ended = not request.running
                yield from pending
                if request.failure is not None:
                    raise request.failure
                if ended:
                    return
        finally:
            self.requests.close(request)

    def _collect(self, request: Request, params: SamplingParams) -> Result:
        deltas: list[list[Delta]] = [[] for _ in range(params.n)]
        for delta in self._deltas(request):
            deltas[delta.index].append(delta)
        scores = [entry for piece in deltas[0] for entry in piece.prompt_logprobs]
        choices = [as_choice(pieces, params.logprobs is not None) for pieces in deltas]
        asked = params.prompt_logprobs is not None
        return Result(request.prompt_ids, choices, request.usage, scores if asked else None)

    # ---- passes beside the loop ----

    def embed(self, batch: Sequence[Sequence[int]], adapter: str = "") -> NDArray[np.float32]:
        """(B, hidden) embeddings of unit length: the mean of the hidden states of all tokens of each row of ids.

        Raises PromptError for an empty batch or row, ids outside the vocabulary, or too many of them.
        """
        return finish(self.embed_steps(batch, adapter))

    def embed_steps(
        self, batch: Sequence[Sequence[int]], adapter: str = ""
    ) -> Generator[None, None, NDArray[np.float32]]:
        """``embed`` as a generator that yields between its passes, so that others get their turn."""
        checked = [self._check_ids(self._check_types(ids)) for ids in batch]
        if not checked:
            raise PromptError("there is nothing to embed; give at least one input")
        means = []
        for ids in checked:
            total: NDArray[np.float64] | float = 0.0
            for chunk in self._chunks(ids, EMBED_CHUNK, adapter):
                with self._lock:
                    rows = self.lm.hidden([chunk])
                total = total + rows.sum(axis=0, dtype=np.float64)
                yield
            length = float(np.linalg.norm(total))
            if not 0.0 < length < np.inf:
                raise LogitsError(
                    f"hidden states of length {length}: the computation overflowed or the weights are damaged; try "
                    "dtype float32 (or bfloat16), and check the checkpoint"
                )
            means.append(total / length)  # the direction of the mean
        return np.asarray(means, np.float32)

    def _passes(self, ids: list[int], adapter: str) -> Iterator[NDArray[np.float32]]:
        """Logits of ``ids`` in bounded pieces."""
        for chunk in self._chunks(ids, SCORE_CHUNK, adapter):
            with self._lock:
                rows = self.lm.forward([chunk])
            yield rows

    def _chunks(self, ids: list[int], size: int, adapter: str) -> Iterator[Chunk]:
        """``ids`` in pieces, in cache blocks taken from the pool until the last one is done."""
        with self._lock:
            blocks = self._loop.take_blocks(-(-len(ids) // self.lm.block_size))
        try:
            alpha = self.lm.rope_alpha(len(ids))
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                yield Chunk(part, start, blocks, alpha, len(part), adapter)
        finally:
            with self._lock:
                self._loop.pool.free(blocks)


def finish(steps: Generator[None, None, T]) -> T:
    """Run a computation that comes in steps to its end; its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
