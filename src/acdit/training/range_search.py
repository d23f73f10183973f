"""The range of mask rates that training draws from, chosen by the variance of the bound (BD3-LMs, section 5)."""

from __future__ import annotations

import math
from typing import Any

import torch

from acdit import draws
from acdit.corruption import MaskingCorruption
from acdit.corruption.masking import candidate_ranges, range_variances
from acdit.training.batches import Batch
from acdit.training.build import Built
from acdit.training.parallel import Parallel


@torch.no_grad()
def choose_range(built: Built, model: Any, batches: list[Batch], parallel: Parallel, step: int) -> dict[str, float]:
    """Set the corruption's range to the candidate of the lowest variance, on the batch at hand.

    The losses are those of the model in training at rates drawn over the whole range (keyed, as all draws); every
    process comes to the same choice. BD3-LMs search on validation batches; the batch at hand has been seen once.

    Args:
        built: its corruption is changed.
        model: as the loop calls it.
        batches: the step's micro-batches of this process.
        parallel: the processes.
        step: done so far; keys the draws.

    Returns:
        The range and its variance, to be logged.
    """
    corruption = built.corruption
    assert isinstance(corruption, MaskingCorruption)  # the recipe's check
    full = MaskingCorruption(
        corruption.block_tokens, corruption.mask_token, "rate", first_token_given=corruption.first_token_given
    )
    size, copies = built.recipe.optim.batch_size, built.recipe.corruption.copies
    start = parallel.rank * (size // parallel.world_size)
    rates, losses = [], []
    for batch in batches:
        samples = range(start, start + len(batch.clean))
        start = samples.stop
        key: dict[str, Any] = {"seed": built.recipe.seed, "step": step, "samples": samples, "copies": copies}
        u = draws.low_discrepancy(batch.clean.shape[1], stream="range_search", batch_size=size, **key)
        noise = draws.uniform(tuple(batch.clean.shape[1:]), stream="range_search_noise", **key).to(parallel.device)
        timestep, clean = full.timesteps(u).to(parallel.device), batch.clean[:, None]
        bf16 = built.recipe.train.precision == "bf16"
        with torch.autocast(parallel.device.type, torch.bfloat16, enabled=bf16):
            noisy = full.corrupt(clean, noise, timestep)
            (prediction,) = model(batch.context, noisy, timestep, batch.labels, return_dict=False)
        losses.append(full.loss_per_block(prediction, clean, noise, timestep).flatten())
        rates.append(full.rate(timestep).flatten())
    found = range_variances(
        torch.cat(rates), torch.cat(losses), [one for one in candidate_ranges() if corruption.allows(one)]
    )
    found = {one: parallel.processes.mean(variance) for one, variance in found.items()}
    best = min(found, key=lambda one: found[one])
    if math.isfinite(found[best]):
        corruption.set_range(best)
    low, high = corruption.mask_range
    return {"mask_range_low": low, "mask_range_high": high, "mask_range_variance": found[best]}
