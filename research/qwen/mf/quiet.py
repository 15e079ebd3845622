"""Imports MindFormers without its chatter. ``-v`` of our commands, or QWEN_VERBOSE=1, brings everything back.

MindFormers writes warnings about optional modules while it is imported, and then some two hundred INFO lines to
stdout for one answer. Errors stay: they go to stderr. Imports neither MindSpore nor MindFormers at module level.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

VERBOSE = "QWEN_VERBOSE"


def verbose() -> bool:
    """Whether the user asked for MindFormers' own messages."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def import_mindformers() -> None:
    """Import MindFormers; silently, if we are the first to import it and nobody asked for its messages."""
    if "mindformers" in sys.modules or verbose():
        import mindformers  # noqa: F401

        return
    # MindSpore reads these when it is first imported: 3 = errors only; the allocator prints its settings otherwise.
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("MS_ALLOC_CONF", "")
    with _hushed():
        import mindformers  # noqa: F401
    _hush_loggers()
    _hush_prints()


@contextmanager
def _hushed() -> Iterator[None]:
    """No log records and no Python warnings inside; errors still."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _hush_loggers() -> None:
    """Only errors of MindFormers' loggers, on stderr. It makes a new one per output folder: mend the factory too."""
    # ``mindformers.tools.logger`` as an attribute is an object of that name, not the module.
    module: ModuleType = sys.modules["mindformers.tools.logger"]
    make = module.get_logger

    def get_logger(logger_name: str = "mindformers", **options: Any) -> logging.Logger:
        options.setdefault("stdout_level", "ERROR")
        return _to_stderr(make(logger_name, **options))

    module.get_logger = get_logger  # type: ignore[attr-defined]
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.startswith("mindformers"):
            _to_stderr(logger)


def _to_stderr(logger: logging.Logger) -> logging.Logger:
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setLevel(logging.ERROR)
            handler.setStream(sys.stderr)
    return logger


def _hush_prints() -> None:
    """The whole configuration by pprint, and a complaint that the CPU has no streams to wait for."""
    import mindformers.trainer.base_trainer as base_trainer
    import mindspore.runtime.stream as stream

    base_trainer.pprint = lambda *_args, **_options: None
    status = getattr(stream, "function_stream_status", None)
    if isinstance(status, dict) and "synchronize" in status:
        status["synchronize"] = True  # = already reported
