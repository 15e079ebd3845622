"""The OpenAI-compatible HTTP server: one model thread, and HTTP that never waits for it."""
