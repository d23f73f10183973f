"""What the campaigns share: their two lengths, and children in which a fault may do its worst."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
LONG = [pytest.mark.campaign, pytest.mark.timeout(3600)]
"""Marks of a long form."""


def short_and_long(short: int, long: int) -> pytest.MarkDecorator:
    """The argument `cases`: a handful in every run of the tests, many behind the marker `campaign`."""
    return pytest.mark.parametrize(
        "cases", [pytest.param(short, id="short"), pytest.param(long, id="long", marks=LONG)]
    )


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function of a test module gives, called in a fresh interpreter; a crash or a hang fails the test."""
    code = f"import json, sys; from {function.__module__} import {function.__name__} as f; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(f(*json.loads(sys.argv[1]))))", json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=3500,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_child(action: Callable[[], int], largest_file: int | None = None, seconds: int = 120) -> tuple[int, str]:
    """Run `action` in a forked child; its exit code (negative: the signal that ended it) and what it said on stderr.

    Args:
        action: gives the exit code.
        largest_file: bytes; a file that would grow beyond meets the kernel's EFBIG, as it would meet a full disk.
        seconds: after which the child is ended by SIGALRM.
    """
    read, write = os.pipe()  # the limit of file sizes does not hold for a pipe
    child = os.fork()
    if child == 0:
        code = 99
        try:
            locks_of_its_own()
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # pytest's own lead to files, whose size would be limited too.
            sys.stdout, sys.stderr = (os.fdopen(handle, "w", errors="backslashreplace") for handle in (1, 2))
            os.close(read)
            signal.alarm(seconds)
            if largest_file is not None:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as said:
        words = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


def locks_of_its_own() -> None:
    """In a forked child: were it killed while it holds tqdm's lock, which is shared, its parent would wait for ever."""
    tqdm.set_lock(threading.RLock())


def peak_megabytes() -> int:
    """The largest resident size of this process since `reset_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))


def reset_peak() -> int:
    """Start measuring anew; the size at this moment."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_megabytes()
