"""Text to token ids and back: tokenizer, ChatML, streaming detokenizer, stop strings. No MindSpore here."""
