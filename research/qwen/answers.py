"""What a request gives back, and how its tokens become text while it runs. Pure Python; used by the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from research.qwen.decode.loop import Event
from research.qwen.decode.params import SamplingParams
from research.qwen.messages import Delta, FinishReason, TokenLogprob, Usage
from research.qwen.text.detokenizer import Detokenizer
from research.qwen.text.stop import StopMatcher
from research.qwen.text.tokenizer import QwenTokenizer


@dataclass(frozen=True)
class Choice:
    """One answer: new token ids (the ending control id included, where one came), their text, why it ended."""

    ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Result:
    """All answers to one prompt; ``ids``, ``text`` and ``finish_reason`` are those of the first."""

    prompt_ids: list[int]
    choices: list[Choice]
    usage: Usage

    @property
    def ids(self) -> list[int]:
        """New token ids of the first answer."""
        return self.choices[0].ids

    @property
    def text(self) -> str:
        """Text of the first answer, without stop string and control tokens."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended: stop or length."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the first answer, if asked for."""
        return self.choices[0].logprobs


@dataclass(frozen=True)
class Score:
    """Log-probability of each scored token given all before it, and whether greedy decoding would have chosen it."""

    ids: list[int]
    logprobs: NDArray[np.float64]  # (len(ids),)
    greedy: NDArray[np.bool_]  # (len(ids),)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return float(self.logprobs.sum())


class Track:
    """One choice of one request while it runs: ids to whole characters to text without stop strings."""

    def __init__(self, tokenizer: QwenTokenizer | None, stops: Sequence[str]):
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.matcher = StopMatcher(stops)
        self.done = False

    def add(self, event: Event) -> Delta:
        """The part of the event's text that can be shown; ``done`` is set when the choice has ended."""
        hidden = event.ends_text
        text = ""
        if self.detokenizer is not None:
            piece = "" if hidden else self.detokenizer.add(event.token)
            if event.finish_reason is not None:
                piece += self.detokenizer.flush()
            text = self.matcher.feed(piece)
        reason = event.finish_reason
        if self.matcher.matched is not None:
            reason = "stop"
        elif reason is not None:
            text += self.matcher.flush()
        self.done = reason is not None
        logprobs = (event.logprob,) if event.logprob is not None else ()
        return Delta(text, (event.token,), event.choice, reason, logprobs)


class Request:
    """A running request: its tracks, and the deltas nobody has fetched yet."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams, tokenizer: QwenTokenizer | None):
        self.prompt_ids = prompt_ids
        self.tracks = [Track(tokenizer, params.stop) for _ in range(params.n)]
        self.inbox: deque[Delta] = deque()
        self.new_tokens = 0
        self.failure: BaseException | None = None

    @property
    def running(self) -> bool:
        return not all(track.done for track in self.tracks)
