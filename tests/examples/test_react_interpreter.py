"""The code interpreter: what it prints, and what code of a model cannot do in it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from examples.react import interpreter
from examples.react.interpreter import Limits, code_interpreter, run_code
from examples.react.run import build_parser
from examples.react.toolbox import Toolbox, ToolError
from research.qwen.messages import ToolCall

pytestmark = pytest.mark.slow


def _isolates() -> bool:
    try:
        run_code("pass")
    except ToolError:
        return False
    return True


needs_isolation = pytest.mark.skipif(not _isolates(), reason="this machine does not allow namespaces")


@needs_isolation
@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2"),
        ("x = 3\nprint('你好', x)\nx * 2", "你好 3\n6"),
        ("pass", "[no output]"),
        ("print('a'); None", "a"),
        ("import math, json, statistics\nstatistics.mean([1, 2, 6])", "3"),
        ("open('a', 'w').write('abc'); open('a').read()", "'abc'"),
        ("import sys; print('so'); sys.exit(3)", "so\n[failed with exit code 3]"),
        ("if __name__ == '__main__': print('main')", "main"),
    ],
)
def test_code_runs_like_a_cell(code: str, output: str) -> None:
    assert run_code(code) == output


@needs_isolation
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x ==", "SyntaxError: invalid syntax"),
        ("x\x00", "null bytes"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("f()", "NameError: name 'f' is not defined"),
    ],
)
def test_errors_are_shown_without_our_own_frames(code: str, error: str) -> None:
    shown = run_code(code)
    assert error in shown and shown.endswith("[failed with exit code 1]")
    assert 'File "<string>"' not in shown and "ast.py" not in shown


@needs_isolation
@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 22), 3)", "OSError: [Errno 101]"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 3)", "OSError: [Errno 101]"),
        (f"open({str(Path(__file__).with_name('written'))!r}, 'w')", "Errno"),
        ("open('/var/tmp/written', 'w')", "Read-only file system"),
        ("open('/dev/shm/written', 'w')", "Read-only file system"),
        ("open('big', 'wb').write(bytes(30 << 20))", "File too large"),
        ("for n in range(4): open(f'f{n}', 'wb').write(bytes(6 << 20))", "No space left"),
        ("bytearray(1 << 30)", "MemoryError"),
        ("import os\nwhile True:\n    if os.fork() == 0:\n        os.read(0, 1) or os.pause()", "Error"),
        ("import os; os.kill(2, 0)", "ProcessLookupError"),
        ("import os; [os.listdir(p) for p in ('/run', '/proc', '/home')] == [[], [], []] or f(); g()", "'g'"),
    ],
)
def test_limits_hold(code: str, refusal: str) -> None:
    shown = run_code(code)
    assert refusal in shown and "[failed with exit code 1]" in shown
    assert not Path(__file__).with_name("written").exists()


@needs_isolation
def test_privileges_are_gone() -> None:
    code = """
import ctypes, os
c = ctypes.CDLL(None, use_errno=True)
print(c.mount(b"none", b"/", None, 32 | 0x1000, None), c.umount(b"/tmp"), c.setuid(0), os.getuid() == 0)
print(os.listdir("/tmp"), os.getpid(), sorted(k for k in os.environ if k.startswith(("QWEN", "VIRTUAL", "PYTEST"))))
"""
    assert run_code(code) == "-1 -1 -1 False\n[] 1 []"


@needs_isolation
def test_a_namespace_in_the_namespace_uncovers_nothing() -> None:
    code = """
import ctypes, os
c = ctypes.CDLL(None)
c.unshare(0x10000000 | 0x20000)  # a user namespace of its own, if it gets one
print([c.umount2(p, 2) for p in (b"/run", b"/proc", b"/tmp")], c.mount(b"none", b"/", None, 32 | 0x1000, None))
print(os.listdir("/run"), os.listdir("/proc"))
open("/usr/written", "w")
"""
    shown = run_code(code)
    assert shown.startswith("[-1, -1, -1] -1\n[] []\n") and "Read-only file system" in shown


@needs_isolation
def test_endless_code_is_ended() -> None:
    assert "killed" in run_code("while True: pass", Limits(seconds=1, wall=60.0))
    assert run_code("import time; time.sleep(60)", Limits(wall=0.5)) == "[stopped after 0.5 seconds]"
    shown = run_code("while True: print('x' * 99)", Limits(output=500))
    assert shown.endswith("[output cut after 500 bytes]") and len(shown) < 600


@needs_isolation
def test_nothing_goes_on_running(tmp_path: Path) -> None:
    started = time.monotonic()
    run_code(
        "import os, time\nif os.fork() == 0:\n    os.setsid(); os.close(1); os.close(2); time.sleep(54321)"
    )
    deadline = started + 20
    while _sleeping() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _sleeping()


def _sleeping() -> bool:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                b"sandbox_child" in entry.read_bytes()
                or b"Runs Python code that is not trusted" in entry.read_bytes()
            ):
                return True
        except OSError:
            continue
    return False


@needs_isolation
@pytest.mark.parametrize("arguments", ['{"code": "6*7"}', "```py\n6*7\n```", "6*7", '"6*7"'])
def test_the_tool_takes_code_in_every_form(arguments: str) -> None:
    toolbox = Toolbox([code_interpreter()])
    assert toolbox.run(ToolCall("a", "code_interpreter", arguments)) == "42"


def test_without_isolation_there_is_no_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "child.py"
    refusing.write_text("print('unshare: not permitted'); raise SystemExit(90)")
    monkeypatch.setattr(interpreter, "CHILD", refusing)
    with pytest.raises(
        ToolError, match=r"refused: this machine cannot isolate it \(unshare: not permitted\)"
    ):
        code_interpreter()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ToolError, match="needs Linux"):
        code_interpreter()


def test_it_is_off_by_default() -> None:
    assert build_parser().parse_args(["--url", "x"]).code_interpreter is False
