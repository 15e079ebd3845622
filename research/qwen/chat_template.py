"""Constants of text and templates: the renderer uses them, and exported tokenizers carry them to other engines."""

from __future__ import annotations

from typing import Final

DEFAULT_SYSTEM: Final = "You are a helpful assistant."

# For tokenizer_config.json. A tokenizer that parses control tokens in text reads them in contents, too: only our own
# renderer (text/chatml.py) keeps them apart.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How text is cut before byte-pair encoding.
SPLIT_PATTERN: Final = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
