"""Ctrl-C and graph runs: MindSpore's own SIGINT handler ends the whole process, and it stays after a run.

So the signal is held back during such calls, Python's handler is put back, and a pending one is delivered then, as an
ordinary KeyboardInterrupt. It is held back in the calling thread and in all threads born meanwhile, which is why a
program that wants to survive Ctrl-C loads the model under ``held`` too, before NumPy and MindSpore start theirs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT back; a pending one raises KeyboardInterrupt in the main thread when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        handler = signal.getsignal(signal.SIGINT)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # MindSpore has replaced it behind Python's back
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
