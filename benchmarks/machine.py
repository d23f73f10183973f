"""What a measurement was taken on: processor, versions, commit, and how fast the machine multiplies matrices."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from acdit.products import CPU_MULTIPLIES_BF16
from acdit.provenance import processor

RESULTS = Path(__file__).parent / "results"


def matmul_rate(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of a linear of the shape that an ACDiT-B MLP has at 2048 tokens, best of what fits the time."""
    x, weight = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 768 * 3072 / min(times)


def commit() -> str:
    """Short commit of this repository, marked when tracked files differ from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")


def describe(reference: str | None) -> dict[str, Any]:
    """Everything a result must carry."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": CPU_MULTIPLIES_BF16,
        "matmul_tflops": {
            "fp32": round(matmul_rate(torch.float32) / 1e12, 4),
            "bf16": round(matmul_rate(torch.bfloat16) / 1e12, 4),
        },
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit(),
        "reference": reference,
        "date": time.strftime("%Y-%m-%d"),
    }


def slug(machine: dict[str, Any]) -> str:
    """<machine>-<date>, for file names."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    return f"{name}-{machine['cores']}cpu-{machine['date']}"


def as_markdown(machine: dict[str, Any]) -> list[str]:
    """The machine as lines of a result file."""
    rates = machine["matmul_tflops"]
    bf16 = "in hardware" if machine["bf16_in_hardware"] else "not in hardware (emulated)"
    return [
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instruction_set']}, bf16 {bf16}",
        f"- matrix multiplication (2048×768 by 768×3072): fp32 {rates['fp32']:.3f} TFLOP/s, "
        f"bf16 {rates['bf16']:.3f} TFLOP/s; load average at start {machine['load_average_at_start']}",
        f"- python {machine['python']}, torch {machine['torch']}, diffusers {machine['diffusers']}",
        f"- commit {machine['commit']}, {machine['date']}",
        f"- reference: {machine['reference'] or 'not given'}",
    ]


def command(script: str) -> str:
    """The command line, without the paths of this machine."""
    words = [
        "PATH" if before in ("--reference", "--mar", "--bd3lms", "--data", "--output", "--results") else word
        for before, word in zip(sys.argv, sys.argv[1:], strict=False)
    ]
    return " ".join(["python", f"benchmarks/{script}", *words])


def say(line: str) -> None:
    """Progress, at once."""
    print(line, flush=True)


def spread(values: list[float]) -> str:
    """Median and range, for a table."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f}, n={len(values)})"
