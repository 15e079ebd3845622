"""Runs Python code that is not trusted; started by ``interpreter.run_code`` as ``python -I -c <this file>``.

Reads {"code", "seconds", "memory", "processes", "file_size"} as JSON from standard input. The code sees no network
(a namespace of its own without one), a read-only file system but for a small empty /tmp, no home folders and no other
processes; it has no privileges. Exit code 90: this machine does not allow that, and nothing was run. No other imports
than the standard library.
"""

import ast
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import traceback

REFUSED = 90
NOBODY = 65534
# Imported before privileges go: where only root may read Python's library, code would find none of it.
PRELOADED = (
    "collections csv datetime decimal encodings.idna fractions functools itertools math random re socket statistics "
    "string time"
).split()
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _NO_NEW_PRIVILEGES = 1, 4, 38
_PRIVATE_TREE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE
_NO_DEVICES_OR_SUID = 0x2 | 0x4  # MS_NOSUID | MS_NODEV
# Covered by empty folders: sockets of services, private files, other processes.
_HIDDEN = ("/run", "/proc", "/home", "/root", "/mnt", "/media", "/srv")
_MOUNT_SETATTR, _WHOLE_TREE, _READ_ONLY = 442, 0x8000, 1
_CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError if a call of the C library failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def isolate(file_size: int) -> None:
    """Leave network, processes and writable files behind; the next fork is alone in its world."""
    if os.geteuid() == 0:  # the limit on processes does not bind root
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        check(libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(_NEW_USER | _NEW_NET | _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    check(libc.mount(b"none", b"/", None, _PRIVATE_TREE, None), "mount")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(
        libc.syscall(_MOUNT_SETATTR, -1, b"/", _WHOLE_TREE, ctypes.byref(attributes), size), "mount_setattr"
    )
    for folder in _HIDDEN:
        # Where Python itself is must stay.
        if os.path.isdir(folder) and not any(
            f"{p}/".startswith(f"{folder}/") for p in (sys.prefix, sys.base_prefix)
        ):
            flags = _NO_DEVICES_OR_SUID | _READ_ONLY
            check(
                libc.mount(b"none", folder.encode(), b"tmpfs", flags, b"size=4k,mode=755"), f"mount {folder}"
            )
    options = f"size={2 * file_size},nr_inodes=256,mode=700,uid={user},gid={group}".encode()
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _NO_DEVICES_OR_SUID, options), "mount /tmp")
    os.chdir("/tmp")


def drop_privileges() -> None:
    """Give up what the new user namespace granted: without it nothing can be mounted anew."""
    check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    check(libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")


def limit(job: dict[str, int]) -> None:
    """Bound time, memory, processes and files."""
    for kind, most in (
        (resource.RLIMIT_CPU, job["seconds"]),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_FSIZE, job["file_size"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def run(code: str) -> int:
    """Run as a notebook cell: the value of a last expression is printed. Returns the exit code."""
    scope = {"__name__": "__main__"}
    try:
        tree = ast.parse(code, "<code>")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        traceback.print_exc(limit=0)
        return 1
    try:
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        # The first frame is this file's.
        sys.stdout.flush()  # what it printed comes before
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error, limit=5)
        return 1
    return 0


def inside(job: dict[str, int], code: str) -> int:
    """The only process of the new world."""
    check(libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    drop_privileges()
    limit(job)
    result = run(code)
    sys.stdout.flush()
    return result


def main() -> int:
    """Isolate, fork, wait; the exit code tells refusals from failures of the code."""
    for name in PRELOADED:
        importlib.import_module(name)
    job = json.loads(sys.stdin.buffer.read())
    code = job.pop("code")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        isolate(job["file_size"])
    except OSError as error:
        print(error, flush=True)
        return REFUSED
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = inside(job, code)
        finally:
            os._exit(status & 0x7F if status != REFUSED else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 1 if status == REFUSED else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
