"""Streaming detokenizer: token by token, whole characters only."""

from __future__ import annotations

import codecs

from research.qwen.text.tokenizer import QwenTokenizer


class Detokenizer:
    """Turns a stream of ids into text that never has to be taken back.

    Invariant: the joined results of ``add`` plus ``flush`` equal ``tokenizer.decode`` of all ids without the
    control tokens (or with them). The words of an additional vocabulary are text and stay.
    """

    def __init__(
        self, tokenizer: QwenTokenizer, skip_special_tokens: bool = True, errors: str = "replace"
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_tokens.values()) if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def add(self, token_id: int) -> str:
        """Return the characters that ``token_id`` completes; often one token's text, sometimes none.

        Raises:
            PromptError: the id is outside the vocabulary.
        """
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what an unfinished character leaves behind (U+FFFD with "replace") and start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
