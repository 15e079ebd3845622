"""Tokenizer, model and decoding as one object: prompts and messages in, text and deltas out.

Many requests may run at once, from one thread or several: whoever waits for a token drives the shared loop and hands
the others theirs. Imports neither MindSpore nor MindFormers; ``from_pretrained`` loads the model behind it lazily.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.answers import Choice, Request, Result, Score
from research.qwen.decode.loop import Chunk, GenerationLoop, LanguageModel
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import PromptError, RequestError
from research.qwen.messages import Delta, Message, Usage
from research.qwen.text import chatml
from research.qwen.text.tokenizer import QwenTokenizer

SCORE_CHUNK = 256  # rows of logits held at once while scoring: 256 x 151936 float32 = 156 MB

NO_VOCABULARY = (
    "This model was loaded without one: put its qwen.tiktoken beside the checkpoint, name it (vocab_file), set "
    "QWEN_TIKTOKEN, or pip install dashscope, which ships the published file; token ids work without"
)

log = logging.getLogger(__name__)
Prompt = str | Sequence[int]


class Engine:
    """A loaded model with its vocabulary and the checkpoint's own generation defaults.

    Args:
        lm: the language model; ``from_pretrained`` makes one.
        tokenizer: None works too: prompts are then ids, and ``text`` stays empty.
        generation: the checkpoint's generation_config as a mapping; it gives the defaults of ``params=None``.
        eos_ids: ids that end an answer, if not to be derived from tokenizer and chat format.
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
        use_cache: bool = True,
    ):
        self.lm, self.tokenizer = lm, tokenizer
        self.generation = dict(generation or {})
        self.chat_format = str(self.generation.get("chat_format", "raw"))
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else self._default_eos()
        self._loop = GenerationLoop(lm, max_batch=max_batch, prefill_chunk=prefill_chunk, use_cache=use_cache)
        self._requests: dict[int, Request] = {}
        self._lock = threading.RLock()

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
            options: max_batch, prefill_chunk, use_cache as for Engine.
        Raises:
            ConfigError, CheckpointError, VocabularyError, KernelError: each says what is wrong and how to mend it.
        """
        from research.qwen.model.opening import open_model
        from research.qwen.model.precision import Precision

        precision = Precision(dtype, lm_head_dtype, embedding_dtype, kv_dtype, activations)
        opened = open_model(path, device, backend, config, precision, num_blocks, block_size, threads)
        tokenizer = _find_tokenizer(vocab_file or opened.vocab_file, opened.folder, opened.runtime.vocab_size)
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

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Result]:
        """Complete prompts (texts, or lists of ids) together; results in the order of the prompts.

        Raises PromptError for an empty or too long prompt or ids outside the vocabulary, before anything runs.
        """
        params = params or self.default_params()
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        keys = self._submit(encoded, params)
        try:
            return [self._collect(key, params) for key in keys]
        finally:
            self._forget(keys)  # after an interruption the others must not go on

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt, yielding deltas of whole characters; the last one has finish reason and usage.

        Closing the iterator early cancels the request and frees its cache.
        """
        params = params or self.default_params()
        key = self._submit([self._encode(prompt)], params)[0]
        return self._deltas(key, self._requests[key])

    def chat(
        self, messages: Sequence[Message | Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Result:
        """Answer a conversation (Message values, or mappings with role and content).

        Without a system message the published default is used. Raises PromptError if the prompt is too long.
        """
        return self.generate([self.render(messages)], params)[0]

    def chat_stream(
        self, messages: Sequence[Message | Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Like ``chat``, as a stream of deltas."""
        return self.stream(self.render(messages), params)

    def render(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Prompt ids of a conversation in ChatML, ready for the assistant's answer."""
        if self.tokenizer is None:
            raise RequestError(f"chat needs a vocabulary. {NO_VOCABULARY}")
        turns = [_as_message(message, place) for place, message in enumerate(messages)]
        if not turns:
            raise PromptError("messages is empty; give at least one user message")
        if turns[0].role != "system":
            turns.insert(0, Message("system", chatml.DEFAULT_SYSTEM))
        return chatml.render(turns, self.tokenizer)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(T, V) float32 logits of one pass over ``ids``."""
        return np.concatenate([rows for rows in self._passes(self._check_ids(list(ids)))])

    def score(self, prompt: Prompt, continuation: Prompt | None = None) -> Score:
        """Log-probabilities of a continuation after a prompt; without one, of the prompt after its first token."""
        head = self._encode(prompt)
        tail = self._encode(continuation) if continuation is not None else head[1:]
        ids = head + tail if continuation is not None else head
        if not tail:
            raise PromptError("nothing to score: give two tokens or more, or a continuation")
        first = len(ids) - len(tail)
        logprobs, greedy, start = [], [], 0
        for rows in self._passes(self._check_ids(ids)):
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

    def _submit(self, encoded: Sequence[list[int]], params: SamplingParams) -> list[int]:
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a vocabulary; use stop_token_ids")
        keys: list[int] = []
        with self._lock:
            try:
                for ids in encoded:
                    keys.append(self._loop.add(ids, params, self.eos_ids))
                    self._requests[keys[-1]] = Request(ids, params, self.tokenizer)
            except PromptError:  # all or nothing: what came before the bad prompt must not run either
                self._forget(keys)
                raise
        return keys

    def _forget(self, keys: Sequence[int]) -> None:
        """Drop requests nobody waits for any more, and free their cache."""
        with self._lock:
            for key in keys:
                request = self._requests.pop(key, None)
                if request is not None and request.running:
                    self._loop.cancel(key)

    def _pump(self) -> None:
        """One step of the shared loop; its events go to the inboxes of their requests."""
        try:
            events = self._loop.step()
        except BaseException as error:
            for request in self._requests.values():
                request.failure = error
            self._requests.clear()
            raise
        for event in events:
            asked = self._requests.get(event.key)
            if asked is None or asked.tracks[event.choice].done:
                continue
            track = asked.tracks[event.choice]
            asked.inbox.append(track.add(event))
            asked.new_tokens += 1
            if track.done and event.finish_reason is None:  # a stop string: the loop does not know it yet
                self._loop.cancel(event.key, event.choice)

    def _deltas(self, key: int, request: Request) -> Iterator[Delta]:
        try:
            while True:
                with self._lock:
                    if request.failure is not None:
                        raise request.failure
                    if not request.inbox and request.running:
                        self._pump()
                    pending = [request.inbox.popleft() for _ in range(len(request.inbox))]
                    ended = not request.running
                for place, delta in enumerate(pending):
                    if ended and place == len(pending) - 1:
                        usage = Usage(len(request.prompt_ids), request.new_tokens)
                        delta = replace(delta, usage=usage)
                    yield delta
                if ended:
                    return
        finally:
            self._forget([key])

    def _collect(self, key: int, params: SamplingParams) -> Result:
        request = self._requests[key]
        deltas: list[list[Delta]] = [[] for _ in range(params.n)]
        usage = Usage(len(request.prompt_ids), 0)
        for delta in self._deltas(key, request):
            deltas[delta.index].append(delta)
            usage = delta.usage or usage
        choices = []
        for pieces in deltas:
            ids = [i for piece in pieces for i in piece.ids]
            logprobs = (
                [entry for piece in pieces for entry in piece.logprobs]
                if params.logprobs is not None
                else None
            )
            reason = pieces[-1].finish_reason or "length"
            choices.append(Choice(ids, "".join(piece.text for piece in pieces), reason, logprobs))
        return Result(request.prompt_ids, choices, usage)

    def _passes(self, ids: list[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of ``ids`` in bounded pieces, in cache blocks taken from the pool for this call."""
        count = -(-len(ids) // self.lm.block_size)
        with self._lock:
            blocks = self._loop.pool.alloc(count)
        if blocks is None:
            raise PromptError(
                f"the cache has no {count} free blocks at the moment; try again when requests ended"
            )
        try:
            alpha = self.lm.rope_alpha(len(ids))
            for start in range(0, len(ids), SCORE_CHUNK):
                part = ids[start : start + SCORE_CHUNK]
                with self._lock:
                    rows = self.lm.forward([Chunk(part, start, blocks, alpha, len(part))])
                yield rows
        finally:
            with self._lock:
                self._loop.pool.free(blocks)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _as_message(message: Message | Mapping[str, Any], place: int) -> Message:
    if isinstance(message, Message):
        return message
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"messages[{place}].role is {role!r}; use system, user, assistant or tool")
    if not isinstance(content, str):
        raise RequestError(f"messages[{place}].content must be a string, got {type(content).__name__}")
    return Message(role, content)


def _find_tokenizer(vocab_file: str | Path | None, folder: Path, rows: int) -> QwenTokenizer | None:
    """The checkpoint's vocabulary; None if only the published one is at hand and has more tokens than the model."""
    from research.qwen.errors import VocabularyError
    from research.qwen.text.tokenizer import find_vocab_file

    try:
        tokenizer = QwenTokenizer(find_vocab_file(vocab_file, folder))
    except VocabularyError as error:
        if vocab_file is not None or (folder / "qwen.tiktoken").exists():
            raise
        log.warning("no vocabulary: prompts are token ids. %s", error)
        return None
    if len(tokenizer) > rows:
        if vocab_file is not None or (folder / "qwen.tiktoken").exists():
            raise VocabularyError(
                f"{tokenizer.vocab_file} has {len(tokenizer)} tokens, the model only {rows} rows: not its vocabulary"
            )
        log.warning("the published vocabulary does not fit a model of %d rows: prompts are token ids", rows)
        return None
    return tokenizer
