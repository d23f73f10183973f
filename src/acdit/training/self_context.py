"""Context of the model's own making: what sampling will give it, while the target stays the data.

In sampling a block's context is what the model made before; in training it is clean data. The difference adds up over
a long stream. Here every context block is made by the model from the data's block: corrupted up to a level drawn for
the sample, then denoised in a few steps against the model's own blocks before it, and read into its cache. It carries
the model's errors, yet the data's block is still what comes next. One such rollout serves all noisy copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acdit import draws
from acdit.corruption import GaussianCorruption
from acdit.model import ACDiTTransformer


@torch.no_grad()
def own_context(
    model: ACDiTTransformer,
    corruption: GaussianCorruption,
    clean: Tensor,
    labels: Tensor | None,
    *,
    share: float,
    steps: int,
    strength: float,
    key: dict[str, Any],
) -> Tensor:
    """The context of a batch; every draw is keyed, so any cut into processes sees the same.

    Args:
        model: the one in training.
        corruption: its noise.
        clean: (B, N, L, D) data.
        labels: (B,), null label where dropped; None: unconditional.
        share: of the samples that get a context of the model's making; the others keep the data.
        steps: model calls a block.
        strength: highest level that blocks are corrupted to, as a share of the schedule; the level of a sample is
            uniform below it.
        key: seed, step and samples of the draws.

    Returns:
        (B, N, L, D). The last block has no reader and is the data's.
    """
    batch, num_blocks = clean.shape[:2]
    chosen = (draws.uniform((), stream="self_context", **key) < share).to(clean.device)
    level = draws.uniform((), stream="self_context_level", **key) * strength
    noise = draws.normal(tuple(clean.shape[1:]), stream="self_context_noise", **key).to(clean)
    cache = model.new_cache(batch)
    context = clean.clone()
    for block in range(num_blocks - 1):
        data = clean[:, block]
        noisy = corruption.corrupt(data, noise[:, block], corruption.uniform_timesteps(level).to(clean.device))
        for step in range(steps):
            now, after = (corruption.uniform_timesteps(level * (1 - done / steps)) for done in (step, step + 1))
            now, after = now.to(clean.device), after.to(clean.device)
            prediction = model.denoise(noisy.to(model.x_embedder.weight.dtype), now, labels, cache)
            made, left = corruption.split(noisy, prediction.to(noisy), now)
            noisy = made if step == steps - 1 else corruption.corrupt(made, left, after)
        context[:, block] = torch.where(chosen[:, None, None], noisy, data)
        model.prefill(context[:, block : block + 1], cache)
    return context
