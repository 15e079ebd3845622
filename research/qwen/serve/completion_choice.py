"""One choice of /v1/completions: deltas of the engine in, parts of the wire format out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from research.qwen.messages import Delta, TokenLogprob
from research.qwen.serve.logprobs import LegacyLogprobs, TokenNames, joined, prompt_entries
from research.qwen.text.tokenizer import QwenTokenizer


@dataclass(frozen=True)
class CompletionOptions:
    """How the choices of a request are written."""

    tokenizer: QwenTokenizer | None
    names: TokenNames
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # vLLM's list, beside the echo
    echo: bool = False
    token_ids: bool = False


@dataclass(frozen=True)
class Part:
    """A piece of a choice; what comes once only (``extra``) is in the first."""

    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    extra: dict[str, Any] | None = None


class CompletionChoice:
    """Collects deltas; ``parts`` gives what can be shown of them since the last call.

    Nothing is shown before the prompt's log-probabilities are there, if the echo needs them.
    """

    def __init__(self, options: CompletionOptions, prompt_ids: Sequence[int]):
        self._options, self._prompt_ids = options, prompt_ids
        self._legacy = LegacyLogprobs(options.names, options.tokenizer, options.logprobs or 0)
        self._prompt_entries: tuple[TokenLogprob | None, ...] = ()
        self._waits = (options.echo and options.logprobs is not None) or options.prompt_logprobs is not None
        self._begun = False
        self._deltas: list[Delta] = []
        self.total, self.count = 0.0, 0  # of the log-probabilities, for the choice of the best

    def take_prompt(self, delta: Delta) -> None:
        """Take the prompt's log-probabilities from the delta of any choice that has them."""
        if delta.prompt_logprobs:
            self._prompt_entries = delta.prompt_logprobs
            self._waits = False

    def take(self, delta: Delta) -> None:
        """Take a delta of this choice."""
        self._deltas.append(delta)
        self.total += sum(entry.logprob for entry in delta.logprobs)
        self.count += len(delta.logprobs)

    def parts(self) -> list[Part]:
        """What the deltas taken since the last call show."""
        if self._waits or not self._deltas:
            return []
        deltas, self._deltas = self._deltas, []
        parts = [] if self._begun else self._first()
        self._begun = True
        parts += [self._part(delta) for delta in deltas]
        return [part for part in parts if not _silent(part)]

    def _first(self) -> list[Part]:
        options = self._options
        extra: dict[str, Any] = {}
        if options.token_ids:
            extra["prompt_token_ids"] = list(self._prompt_ids)
        if options.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_entries(
                self._prompt_ids, self._prompt_entries, options.names, options.prompt_logprobs
            )
        if not options.echo:
            return [Part("", extra=extra)] if extra else []
        text = options.tokenizer.decode(list(self._prompt_ids)) if options.tokenizer else ""
        logprobs = None
        if options.logprobs is not None:
            logprobs = self._legacy.prompt(self._prompt_ids, self._prompt_entries)
        return [Part(text, logprobs, None, () if options.token_ids else None, extra)]

    def _part(self, delta: Delta) -> Part:
        logprobs = self._legacy.answer(delta.logprobs) if self._options.logprobs is not None else None
        ids = delta.ids if self._options.token_ids else None
        return Part(delta.text, logprobs, delta.finish_reason, ids)


def _silent(part: Part) -> bool:
    """Whether a part shows nothing at all."""
    told = part.logprobs is not None and part.logprobs["tokens"]
    return not (part.text or told or part.finish_reason or part.token_ids or part.extra)


def choice_of(index: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Parts as one element of ``choices``."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    choice: dict[str, Any] = {
        "index": index,
        "text": "".join(part.text for part in parts),
        "logprobs": joined(logprobs) if logprobs else None,
        "finish_reason": parts[-1].finish_reason,
    }
    if parts[-1].token_ids is not None:
        choice["token_ids"] = [token for part in parts for token in part.token_ids or ()]
    for part in parts:
        choice |= part.extra or {}
    return choice


def best(choices: Sequence[CompletionChoice], n: int) -> list[CompletionChoice]:
    """The ``n`` choices with the highest log-probability per token, best first; all, in order, if there are no more."""
    if len(choices) <= n:
        return list(choices)
    return sorted(choices, key=lambda choice: choice.total / max(choice.count, 1), reverse=True)[:n]
