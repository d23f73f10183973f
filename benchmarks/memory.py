"""Memory of one side, measured in a process of its own.

Two figures, for different questions:

- **allocated bytes**: every allocation and release of torch's CPU allocator while the work runs, as the profiler
  records them, added up in time. Exact and reproducible, temporaries inside operators included; what a library takes
  by itself (oneDNN scratch, the allocator's own slack) is not seen. This is the figure that is compared.
- **resident set**: how far the process's peak resident memory rose, as the kernel counts it. A check on the first.

A training step's activation peak is what forward and backward allocate above weights, gradients and optimizer state,
which are allocated before and counted by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workloads import TrainingStep, Work, build_side, step_inputs

from acdit.analysis.allocations import allocated_peak


def peaks(run: Callable[[], Any]) -> dict[str, int | None]:
    """How far allocated bytes and the resident set rise while `run` runs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not hide what this one takes
    reset = Path("/proc/self/clear_refs")
    resident = None
    with contextlib.suppress(OSError):
        reset.write_text("5")
        resident = _status("VmRSS")
    peak = allocated_peak(run)
    highest = _status("VmHWM")
    return {
        "activation_peak": peak,
        "resident_peak": None if resident is None or highest is None else highest - resident,
    }


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(work: Work, side: str, dtype: str, checkout: Path | None) -> dict[str, int | None]:
    """Bytes of one side's step or picture."""
    model, run = build_side(work, side, dtype, checkout)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not isinstance(run, TrainingStep):
        steps = 2  # how many solver steps a block gets does not change the peak
        if side == "ours, compiled":
            run(0, steps)
        return {"weights": weights, **peaks(lambda: run(1, steps))}
    step = run
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    state = [value for entry in step.optimizer.state.values() for value in entry.values()]
    inputs = step_inputs(work, 1)
    if side == "ours, compiled":
        step.forward_backward(inputs)
    return {
        "weights": weights,
        "gradients": sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
        "optimizer_state": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        **peaks(lambda: step.forward_backward(inputs)),
    }


def in_child(work: Work, side: str, dtype: str, checkout: Path | None) -> dict[str, int | None]:
    """`measure` in a process of its own."""
    request = {"work": dataclasses.asdict(work), "side": side, "dtype": dtype}
    command = [sys.executable, __file__, json.dumps(request), *([str(checkout)] if checkout else [])]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"memory of {work.name}, {side}: the child ended with {answer.returncode}\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of one side of one work (a child of bench.py).")
    parser.add_argument("request", help="JSON with work, side and dtype")
    parser.add_argument("reference", type=Path, nargs="?", help="a checkout of thunlp/ACDiT")
    options = parser.parse_args()
    request = json.loads(options.request)
    print(json.dumps(measure(Work(**request["work"]), request["side"], request["dtype"], options.reference)))


if __name__ == "__main__":
    main()
