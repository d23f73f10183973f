"""Freed memory is kept: the next tensors cost no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from acdit.allocator import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else None)
for _ in range(10):
    step = [torch.ones(12, 2**20) for _ in range(3)]  # 48 MB each, all freed at once
    del step
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step = [torch.ones(12, 2**20) for _ in range(3)]
    del step
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GIVEN_BACK = """
import psutil, torch
from acdit.allocator import give_back_freed_memory, keep_freed_memory
if not keep_freed_memory():
    print("no glibc")
    raise SystemExit
resident = lambda: psutil.Process().memory_info().rss
many = [torch.ones(2**16) for _ in range(400)]  # 100 MB
last = torch.ones(2**16)  # above them: the heap's end does not move
full = resident()
del many
kept = resident()
print(give_back_freed_memory(), (full - kept) >> 20, (kept - resident()) >> 20)
"""


def faults(*arguments: str, **environment: str) -> tuple[str, int]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    told = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    done, count = told.stdout.split()
    return done, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    done, kept = faults("keep")
    if done == "False":
        pytest.skip("no glibc here, or the environment sets its thresholds")
    _, returned = faults()
    assert returned > 10_000  # 48 MB are 12,288 pages
    assert kept < returned / 10


def test_what_the_environment_asks_for_stays() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_given_back_when_asked() -> None:
    pytest.importorskip("psutil")
    told = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True).stdout
    if "no glibc" in told:
        pytest.skip(told)
    done, by_itself, given = told.split()
    assert done == "True"
    assert int(by_itself) < 10
    assert int(given) >= 90
