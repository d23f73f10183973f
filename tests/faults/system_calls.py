"""Kill a child at any of its system calls that change files (Linux on x86-64, through ptrace)."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable

import pytest

from tests.faults.campaigns import locks_of_its_own

needs_ptrace = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="numbers of system calls of Linux on x86-64"
)

_TRACEME, _PEEKUSER, _SYSCALL, _SETOPTIONS = 0, 3, 24, 0x4200
_MARK_CALLS, _END_WITH_US = 1, 1 << 20
_NUMBER, _FIRST, _SECOND, _THIRD = (8 * register for register in (15, 14, 13, 12))  # orig_rax, rdi, rsi, rdx
_WRITES = {1: "write", 18: "pwrite64", 20: "writev", 77: "ftruncate", 74: "fsync", 75: "fdatasync", 285: "fallocate",
           40: "sendfile", 326: "copy_file_range"}  # fmt: skip
_NAMES = {82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 76: "truncate", 258: "mkdirat", 263: "unlinkat",
          264: "renameat", 316: "renameat2"}  # fmt: skip
_OPENS = {2: _SECOND, 257: _THIRD}  # open, openat: where their flags are

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_ulong, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, child: int, address: int = 0, data: int = 0) -> int:
    return int(_libc.ptrace(request, child, address, data))


def kill_at_call(action: Callable[[], object], point: int | None) -> tuple[bool, list[str]]:
    """Run `action` in a forked child that is killed right before its `point`-th call that changes a file.

    Args:
        action: what the child does.
        point: counted from 0; None lets it end.

    Returns:
        Whether it was killed, and the calls that it made before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            locks_of_its_own()
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, 0, _MARK_CALLS | _END_WITH_US)
    made: list[str] = []
    entering, passed_on = True, 0
    while True:
        _ptrace(_SYSCALL, child, 0, passed_on)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.WIFEXITED(status), f"the child was ended by signal {os.WTERMSIG(status)}"
            assert os.WEXITSTATUS(status) == 0, "the child failed"
            return False, made
        passed_on = 0
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            passed_on = os.WSTOPSIG(status)
            continue
        if entering and (name := _changes_files(child)) is not None:
            if len(made) == point:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True, made
            made.append(name)
        entering = not entering


def _changes_files(child: int) -> str | None:
    number = _ptrace(_PEEKUSER, child, _NUMBER)
    if number in _WRITES:
        return _WRITES[number] if _ptrace(_PEEKUSER, child, _FIRST) > 2 else None
    if number in _OPENS:
        return "open" if _ptrace(_PEEKUSER, child, _OPENS[number]) & (os.O_CREAT | os.O_TRUNC) else None
    return _NAMES.get(number)
