"""Prometheus metrics (being built: the requests pass through already)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Metrics:
    """Counts what the server does."""

    def __init__(self, model_name: str, scheduler: Callable[[], Any]):
        self.model_name, self._scheduler = model_name, scheduler

    def submit(self, scheduler: Any, prompt_ids: list[int], params: Any, deliver: Any, options: Any) -> Any:
        """Submit to the scheduler."""
        return scheduler.submit(prompt_ids, params, deliver, **options)
