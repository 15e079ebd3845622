"""One call of ``generate`` through the decoding loop: streaming, logits processors and recorded scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.loop import GenerationLoop
from research.qwen.decode.params import SamplingParams
from research.qwen.decode.sampling import LogitsProcessor, PenaltyState, Row
from research.qwen.errors import RequestError
from research.qwen.mf.options import Options


@dataclass
class Record:
    """What one row leaves behind: its new ids and, if asked for, one array of the vocabulary per step."""

    ids: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)


def run(
    loop: GenerationLoop, prompts: Sequence[list[int]], options: Options, processors: Any, streamer: Any
) -> list[Record]:
    """Generate for all prompts together; the streamer gets each step's tokens as they come.

    ``processors`` is a LogitsProcessorList of MindFormers or a list of callables (ids, scores (V,)) -> scores (V,).
    """
    custom = [_adapt(processor) for processor in processors or ()]
    records = [Record() for _ in prompts]
    rows: dict[int, int] = {}
    try:
        for row, prompt in enumerate(prompts):
            params = options.for_prompt(len(prompt), row)
            params, chain = _chain(params, prompt, options, custom, records[row])
            key = loop.add(
                prompt, params, options.eos_ids, stop_sequences=options.stop_words, processors=chain
            )
            rows[key] = row
        running = set(rows)
        while running:
            tokens: dict[int, int] = {}
            for event in loop.step():
                row = rows[event.key]
                records[row].ids.append(event.token)
                tokens[row] = event.token
                if event.finish_reason is not None:
                    running.discard(event.key)
            if streamer is not None and tokens:
                streamer.put(_streamed(tokens, len(prompts)))
    except BaseException:
        for key in rows:
            loop.cancel(key)
        raise
    return records


def padded(prompts: Sequence[list[int]], pad_id: int) -> NDArray[np.int32]:
    """(B, longest) prompts as GenerationMixin hands them to a streamer: padded on the right."""
    out = np.full((len(prompts), max(map(len, prompts))), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        out[row, : len(prompt)] = prompt
    return out


def by_step(
    rows: Sequence[Sequence[NDArray[np.float32]]], vocab_size: int
) -> tuple[NDArray[np.float32], ...]:
    """One (B, V) array per step, as GenerateOutput holds them; zeros for a row that had ended before."""
    steps = max(len(row) for row in rows)
    blank = np.zeros(vocab_size, np.float32)
    return tuple(np.stack([row[step] if step < len(row) else blank for row in rows]) for step in range(steps))


def _streamed(tokens: dict[int, int], batch: int) -> int | list[list[int]]:
    """An int for one prompt, as GenerationMixin has it. For a batch one list per row: from its flat list TextStreamer
    would mix the rows into one text."""
    if batch == 1:
        return tokens[0]
    return [[tokens[row]] if row in tokens else [] for row in range(batch)]


def _chain(
    params: SamplingParams, prompt: list[int], options: Options, custom: list[LogitsProcessor], record: Record
) -> tuple[SamplingParams, list[LogitsProcessor]]:
    """Processors of one row in GenerationMixin's order: penalties, minimum length, the caller's own."""
    chain: list[LogitsProcessor] = []
    if (
        options.logits
    ):  # the loop penalises before any processor sees the row: take that over to record it untouched
        chain.append(_recorder(record.logits))
        if params.penalised:
            chain.append(_penalty(prompt, params))
            params = replace(params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    least = options.least_length(len(prompt))
    if least > len(prompt) and options.eos_ids:
        chain.append(_ban_until(least, options.eos_ids))
    chain += custom
    if options.scores:
        chain.append(_recorder(record.scores))
    return params, chain


def _recorder(target: list[NDArray[np.float32]]) -> LogitsProcessor:
    def record(_: Sequence[int], scores: Row) -> Row:
        target.append(scores.astype(np.float32))
        return scores

    return record


def _penalty(prompt: list[int], params: SamplingParams) -> LogitsProcessor:
    state = PenaltyState(prompt, params)
    seen = len(prompt)

    def penalise(ids: Sequence[int], scores: Row) -> Row:
        nonlocal seen
        for token in ids[seen:]:
            state.add(token)
        seen = len(ids)
        state.apply(scores)
        return scores

    return penalise


def _ban_until(length: int, eos_ids: Sequence[int]) -> LogitsProcessor:
    banned = list(eos_ids)

    def ban(ids: Sequence[int], scores: Row) -> Row:
        if len(ids) < length:
            scores[banned] = -np.inf
        return scores

    return ban


def _adapt(processor: Any) -> LogitsProcessor:
    """A MindFormers LogitsProcessor (process_np on (1, V) arrays), or a plain callable on one row."""
    process = getattr(processor, "process_np", None)
    if process is not None:

        def through_mindformers(ids: Sequence[int], scores: Row) -> Row:
            row = process(scores[None].astype(np.float32), np.asarray([ids], np.int32))
            return np.asarray(row, np.float64).reshape(scores.shape)

        return through_mindformers
    if not callable(processor):
        raise RequestError(
            f"logits_processor holds {processor!r}; expected LogitsProcessor objects or callables"
        )
    called: LogitsProcessor = processor
    return called
