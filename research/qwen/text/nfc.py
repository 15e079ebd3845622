"""NFC normalisation of long texts at little cost where nothing has to change."""

from __future__ import annotations

import re
import unicodedata

_ASCII = re.compile(r"[\x00-\x7f]")
_CHUNK = 512
_STREAK = 8


def to_nfc(text: str) -> str:
    """Return ``text`` in NFC, the same object if it is in NFC.

    unicodedata returns its argument quickly unless some character of it might combine; then it rebuilds
    all. In chunks, a rare combining character costs one chunk; where many are, distinct words are tested.
    """
    if len(text) <= 2 * _CHUNK:
        return unicodedata.normalize("NFC", text)
    if text.isascii():
        return text
    chunks: list[str] = []
    start = streak = 0
    while start < len(text):
        # A chunk begins with an ASCII character, which never combines with what precedes it.
        boundary = _ASCII.search(text, start + _CHUNK)
        end = boundary.start() if boundary else len(text)
        chunk = text[start:end]
        chunks.append(unicodedata.normalize("NFC", chunk))
        rebuilt_for_nothing = chunks[-1] is not chunk and chunks[-1] == chunk
        streak = streak + 1 if rebuilt_for_nothing else 0
        start = end
        if streak == _STREAK and _words_are_nfc(text[start:]):
            chunks.append(text[start:])
            break
    normalised = "".join(chunks)
    # The caller's own object has its UTF-8 form cached by earlier use.
    return text if normalised == text else normalised


def _words_are_nfc(text: str) -> bool:
    """Whether ``text`` is in NFC, if its distinct words can tell at less cost than all of it."""
    # Nothing combines across white space; of it, only these two are not in NFC themselves.
    if "\u2000" in text or "\u2001" in text:
        return False
    words = " ".join(set(text.split()))
    return len(words) < len(text) // 2 and unicodedata.is_normalized("NFC", words)
