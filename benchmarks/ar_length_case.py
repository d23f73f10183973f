"""One measurement of ar_length.py in a process of its own: seconds and memory of one sample, ours or MAR's.

A fresh process for each makes memory comparable and lets a kill, by hand or for lack of memory, cost one measurement.
The process keeps freed memory as the command line does (`acdit.allocator`), for either side.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mar import build_mar, mar_sample
from memory import peaks
from reference import perturb
from torch import nn
from workloads import DTYPES, NUM_CLASSES

from acdit import ACDiTTransformer
from acdit.allocator import keep_freed_memory
from acdit.corruption.gaussian import GaussianCorruption
from acdit.costs import Architecture, picture_flops
from acdit.layout import BlockLayout
from acdit.sampling import sample_blocks

PAPER_STEPS = 25
WARMED_UP = 4096
"""Up to so many tokens a CPU's first sample is a warm-up; beyond, single products take seconds."""


@dataclass(frozen=True)
class Case:
    """What is sampled. Ours: `grid` in cells, `block` in tokens; MAR: a square of as many tokens."""

    name: str
    side: str
    """ "ours" or "mar"."""
    grid: tuple[int, ...]
    block: tuple[int, ...]
    patch: tuple[int, ...]
    layers: int
    """MAR's encoder and decoder have half of them each."""
    heads: int
    """Of 64."""
    batch: int
    steps: int
    """Solver steps a block; of MAR, the steps of its MLP."""
    guidance_scale: float
    device: str
    dtype: str
    iterations: int = 64
    """MAR's."""
    mlp: tuple[int, int] = (0, 0)
    """Width and layers of MAR's MLP."""

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.grid, self.block, self.patch)

    @property
    def tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def blocks(self) -> int:
        return self.layout.num_blocks

    @property
    def extrapolated(self) -> bool:
        """Whether the figure for 25 steps is computed from fewer."""
        return self.side == "ours" and self.steps != PAPER_STEPS

    @property
    def architecture(self) -> Architecture:
        """Of our transformer."""
        return Architecture(self.layout, 4, self.layers, self.heads, 64, num_classes=NUM_CLASSES)

    def flops(self) -> float:
        """FLOPs of the whole sample at 25 steps, from `acdit.costs`; ours only."""
        return self.batch * picture_flops(self.architecture, PAPER_STEPS, guided=self.guidance_scale != 1)

    def cache_bytes(self) -> int:
        """Of the KV cache: all blocks but the last."""
        size = DTYPES[self.dtype].itemsize
        tokens = (self.blocks - 1) * self.layout.block_tokens
        return 2 * self.batch * tokens * 64 * self.heads * self.layers * size


class StepClock:
    """Records from outside how long the model takes for each prediction."""

    def __init__(self, model: nn.Module, verb: str) -> None:
        self.seconds: list[float] = []
        inner = getattr(model, verb)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = now(model)
            answer = inner(*arguments, **options)
            self.seconds.append(now(model) - start)
            return answer

        setattr(model, verb, timed)


def now(model: nn.Module) -> float:
    """The time when the device has finished what it was asked for."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def build(case: Case, checkout: Path | None) -> tuple[nn.Module, Callable[[int], Any]]:
    """The model with random weights, and what draws one batch in a number of steps (of MAR, iterations)."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    if case.side == "mar":
        assert checkout is not None
        model = build_mar(
            checkout, tokens=case.tokens, width=64 * case.heads, depth=case.layers // 2, heads=case.heads,
            mlp_width=case.mlp[0], mlp_depth=case.mlp[1], num_classes=NUM_CLASSES, diffusion_steps=case.steps,
        ).to(device)  # fmt: skip

        def draw(iterations: int) -> Any:
            return mar_sample(
                model, batch=case.batch, iterations=iterations, guidance_scale=case.guidance_scale, seed=0
            )

        return model, draw
    ours = ACDiTTransformer(
        grid=case.grid, block=case.block, patch=case.patch, in_channels=4, num_layers=case.layers,
        num_attention_heads=case.heads, num_classes=NUM_CLASSES,
    )  # fmt: skip
    perturb(ours, 0)
    ours = ours.to(device, dtype).eval()
    scheduler = GaussianCorruption().sampling_scheduler()

    def sample(steps: int) -> Any:
        blocks = sample_blocks(
            ours, scheduler, class_labels=list(range(case.batch)), num_inference_steps=steps,
            guidance_scale=case.guidance_scale, generator=torch.Generator(device).manual_seed(0),
        )  # fmt: skip
        return torch.stack(list(blocks), dim=1)

    return ours, sample


def recorded(model: nn.Module, run: Callable[[], Any]) -> dict[str, int | None]:
    """Bytes above the weights while `run` runs: of the CPU by its allocator's record, of CUDA by its own count."""
    if not next(model.parameters()).is_cuda:
        return peaks(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"activation_peak": torch.cuda.max_memory_allocated() - before, "resident_peak": None}


def measure(case: Case, checkout: Path | None) -> dict[str, Any]:
    """Seconds and bytes of one batch.

    Memory is that of the warm-up, one solver step a block (of MAR, 2 iterations: the first predicts from an empty
    picture, the last reads it whole), because recording every allocation costs time. Where there is no warm-up,
    products take seconds and the recording nothing beside them: memory is that of the timed run.
    """
    load = os.getloadavg()[0]
    model, run = build(case, checkout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = case.iterations if case.side == "mar" else case.steps
    held: dict[str, int | None] = {}
    if case.tokens <= WARMED_UP or case.side == "mar" or case.device == "cuda":
        held = recorded(model, lambda: run(2 if case.side == "mar" else 1))
        if case.device == "cuda":
            run(whole)  # its kernels are chosen, its allocator filled
    clock = StepClock(model, "denoise") if case.extrapolated else None
    answer: dict[str, Any] = {"parameters": parameters, "load_average": round(load, 2)}

    def timed() -> None:
        start = now(model)
        drawn = run(whole)
        answer["seconds"] = now(model) - start
        answer["finite"] = bool(drawn.isfinite().all())

    if held:
        timed()
    else:
        held = recorded(model, timed)
    answer |= held
    answer["seconds_25"] = answer["seconds"]
    if clock is not None:
        by_block = [clock.seconds[first : first + whole] for first in range(0, len(clock.seconds), whole)]
        step = sum(statistics.median(block) for block in by_block)
        answer["solver_step"], answer["reading"] = step, answer["seconds"] - sum(clock.seconds)
        answer["seconds_25"] = answer["reading"] + PAPER_STEPS * step
    return answer


def video(tokens: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """A video of 16 frames and so many tokens, patch 1 × 2 × 2, cut into blocks of whole frames.

    Raises:
        ValueError: tokens that are not 16 squares, or blocks that do not divide 16 frames.
    """
    edge = math.isqrt(tokens // 16)
    if 16 * edge**2 != tokens or not tokens or blocks < 1 or 16 % blocks:
        raise ValueError(f"{tokens} tokens in {blocks} blocks: give 16 · h² tokens, and 1, 2, 4, 8 or 16 blocks")
    return {"grid": (16, 2 * edge, 2 * edge), "block": (16 // blocks, edge, edge), "patch": (1, 2, 2)}


def picture(edge: int, block: int) -> dict[str, tuple[int, ...]]:
    """A picture of edge² tokens, patch 1, cut into squares."""
    return {"grid": (edge, edge), "block": (block, block), "patch": (1, 1)}


def as_request(case: Case) -> str:
    """The case as an argument of this script."""
    return json.dumps(asdict(case))


def end_with_parent() -> None:
    """Let the kernel, where it is Linux, end this process when the one that started it is killed.

    What went on measuring would slow down the next attempt.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement (a child of ar_length.py).")
    parser.add_argument("request", help="JSON of a case")
    parser.add_argument("mar", type=Path, nargs="?", help="a checkout of LTH14/mar")
    options = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    end_with_parent()
    keep_freed_memory()
    request = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(options.request).items()
    }
    with torch.no_grad():
        print(json.dumps(measure(Case(**request), options.mar)))


if __name__ == "__main__":
    main()
