"""Learning-rate factors as pure functions of the step (spec section 6: WSD is the paper's)."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from acdit.recipe import OptimRecipe

_WSD_HALVINGS = 6
_COSINE_END = 0.01


def lr_factor(optim: OptimRecipe, total_steps: int, step: int) -> float:
    """What the learning rate is multiplied with at optimizer step `step` (0-based).

    All schedules warm up linearly over `warmup_steps`. "wsd" stays at 1 and falls as 0.5^(6r), r from 0 to 1 over the
    last `decay_fraction` of the run; "cosine" falls to 0.01; "constant" stays.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        r = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
        return _COSINE_END + (1 - _COSINE_END) * 0.5 * (1 + math.cos(math.pi * r))
    start = decay_start(optim, total_steps)
    if step < start:
        return 1.0
    return 0.5 ** (_WSD_HALVINGS * min(1.0, (step - start) / max(1, total_steps - start)))


def decay_start(optim: OptimRecipe, total_steps: int) -> int:
    """First step of WSD's decay."""
    return total_steps - round(optim.decay_fraction * total_steps)


def make_lr_scheduler(optimizer: torch.optim.Optimizer, optim: OptimRecipe, total_steps: int) -> LambdaLR:
    """`LambdaLR` over `lr_factor`."""
    return LambdaLR(optimizer, lambda step: lr_factor(optim, total_steps, step))
