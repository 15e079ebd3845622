"""A Python interpreter as a tool: code of the model runs in a limited process of its own, or not at all.

Linux only. No network, a read-only file system with a small empty /tmp, and limits on time, memory, processes and file
size; where the kernel does not grant that the tool refuses to exist. The code can still read what everybody on the
machine may read: for hostile users put a container or a virtual machine around the whole program.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.react.sandbox_child import REFUSED
from examples.react.toolbox import BoundTool, ToolError
from research.qwen.text.react import Tool

CHILD = Path(__file__).with_name("sandbox_child.py")
_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Limits:
    """What one run may use; sizes in bytes. ``wall`` is the longest it may take, asleep or not."""

    seconds: int = 5
    wall: float = 10.0
    memory: int = 512 << 20
    processes: int = 16
    file_size: int = 8 << 20
    output: int = 16_000


def run_code(code: str, limits: Limits | None = None) -> str:
    """Run Python code and return what it printed, with the value of a last expression and a note if it failed.

    Raises:
        ToolError: this machine does not allow the isolation; nothing was run.
    """
    limits = limits or Limits()
    job = {name: value for name, value in asdict(limits).items() if name not in ("wall", "output")}
    if not sys.platform.startswith("linux"):
        raise ToolError("the code interpreter needs Linux: only there can it be kept from network and files")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD.read_text(encoding="utf-8")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )
    try:
        output, note = _collect(process, json.dumps({"code": code, **job}).encode(), limits)
    finally:
        _kill(process)
    text = output.decode("utf-8", "replace").rstrip()
    if process.returncode == REFUSED:
        raise ToolError(f"the code interpreter is refused: this machine cannot isolate it ({text})")
    if not note and process.returncode == _KILLED:
        note = (
            f"[killed: it may compute for {limits.seconds} seconds, and the machine must have memory for it]"
        )
    elif not note and process.returncode:
        note = f"[failed with exit code {process.returncode}]"
    return "\n".join(part for part in (text, note) if part) or "[no output]"


def code_interpreter(limits: Limits | None = None) -> BoundTool:
    """The tool, tried once.

    Raises:
        ToolError: this machine does not allow the isolation.
    """
    run_code("pass", limits)
    tool = Tool(
        name="code_interpreter",
        description="Runs Python 3 code without network and returns what it prints.",
        parameters={"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        name_for_human="code interpreter",
        args_format="code",
    )
    return BoundTool(tool, lambda code: run_code(code, limits), raw_argument="code")


def _collect(process: subprocess.Popen[bytes], job: bytes, limits: Limits) -> tuple[bytes, str]:
    """(output, note on a limit that was reached)."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died early; its output says why
    output, end = b"", time.monotonic() + limits.wall
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while ready.select(max(0.0, end - time.monotonic())):
            piece = os.read(process.stdout.fileno(), 65536)
            output += piece
            if not piece:
                process.wait()
                return output, ""
            if len(output) > limits.output:
                return output[: limits.output], f"[output cut after {limits.output} bytes]"
    return output, f"[stopped after {limits.wall:g} seconds]"


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Whatever the code started dies with the first process of its namespace, and that one with this.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
