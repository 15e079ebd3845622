"""SIGTERM and Ctrl-C during training: the step is finished and saved; a second signal ends at once.

MindSpore replaces Python's handlers by its own, which end the whole process. So both signals are blocked in the main
thread and in all threads born later, and one thread waits for them. A thread that is older than the block could still
take one: for that case Python's handlers are put back after every step. A program therefore enters ``StopSignals``
before it imports NumPy and MindSpore, which start threads. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.1
SAME_SECONDS = 1.0  # `timeout` and others signal the process and then its group: that is one wish, not two


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class StopSignals:
    """Context manager; ``name`` is None until SIGTERM or SIGINT has come. Outside the main thread it sees no signals.

    ``tell`` gets one line for the user when a signal comes (from another thread).
    """

    def __init__(self, tell: Callable[[str], None] = _tell) -> None:
        self.name: str | None = None
        self.tell, self._since = tell, 0.0
        self._active = False
        self._done = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()
        self._lock = threading.RLock()  # a handler may interrupt a handler
        self._waiter: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))
            self._before = {number: signal.signal(number, self._handler) for number in SIGNALS}
            self._waiter = threading.Thread(target=self._wait, name="qwen-signals", daemon=True)
            self._active = True
            self._waiter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._active = False
            self._done.set()
            assert self._waiter is not None
            self._waiter.join()
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def restore(self) -> None:
        """Put Python's handlers back; to be called after every run of MindSpore."""
        if self._active:
            for number in SIGNALS:
                signal.signal(number, self._handler)

    def _wait(self) -> None:
        while not self._done.is_set():
            if (found := signal.sigtimedwait(SIGNALS, POLL_SECONDS)) is not None:
                self._signalled(found.si_signo)

    def _handler(self, number: int, _frame: FrameType | None) -> None:
        self._signalled(number)

    def _signalled(self, number: int) -> None:
        with self._lock:
            name, now = signal.Signals(number).name, time.monotonic()
            if self.name is None:
                self.name, self._since = name, now
                self.tell(f"{name}: this step is finished, then all is saved; once more ends at once")
            elif now - self._since > SAME_SECONDS:
                self.tell(f"{name} again: ending at once")
                os._exit(128 + number)
