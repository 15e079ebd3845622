"""Ctrl-C in a real terminal, in the middle of a real model's answer: MindSpore's own handler would end the process."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures_util import model_folder

pytestmark = pytest.mark.mindspore
ROOT = Path(__file__).resolve().parents[2]


# Runs in a new session and takes the terminal, then becomes the command. Not pty.fork(): between fork and exec it would
# run Python in a copy of this process, whose other threads (MindSpore's) may hold a lock at that moment for ever.
TAKES_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
os.execv(sys.executable, [sys.executable, "-m", "research.qwen.cli", *sys.argv[1:]])
"""


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *argv: str):
        self.unread = ""
        self.fd, theirs = pty.openpty()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TAKES_TERMINAL, *argv],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=ROOT,
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def until(self, text: str, seconds: float = 120) -> str:
        """What is printed up to and including ``text``; what came with it but after it is the next call's."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, f"{text!r} did not come; shown: {self.unread[-500:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.unread += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # nobody holds the other end any more
                    shown = self.unread[-500:]
                    raise AssertionError(f"the command left before {text!r}; shown: {shown!r}") from None
        shown, self.unread = self.unread.split(text, 1)
        return shown + text

    def exit_code(self) -> int:
        return self.process.wait(60)

    def kill(self) -> None:
        """Leave nothing running, whatever the test found."""
        self.process.kill()
        self.process.wait(10)
        os.close(self.fd)


def test_ctrl_c_stops_the_answer_and_not_the_chat(published_vocab):
    """The model is random and never ends by itself; its answer fills the context unless it is stopped."""
    folder = str(model_folder("full_vocab_bf16"))
    options = (
        "--vocab",
        str(published_vocab),
        "--max-new-tokens",
        "20000",
        "--temperature",
        "5",
        "--seed",
        "1",
    )
    terminal = Terminal("chat", folder, *options)
    try:
        stop_twice_and_leave(terminal)
    finally:
        terminal.kill()


def stop_twice_and_leave(terminal: Terminal) -> None:
    terminal.until("> ")
    for _ in range(2):
        terminal.send("你好\n".encode())
        time.sleep(4)  # in the middle of the answer
        terminal.send(b"\x03")
        terminal.until("[stopped]")
        terminal.until("> ")
    time.sleep(
        1
    )  # readline prints its prompt a moment before it waits; a signal in between is seen at the next key
    terminal.send(b"\x03")
    terminal.until("leaves")
    terminal.send(b"/exit\n")
    assert terminal.exit_code() == 0
