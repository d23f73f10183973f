"""Random numbers that depend on what they are for, not on when they are drawn.

Every draw is keyed by (seed, stream, step, global sample index, copy) with a counter-based Philox generator on the CPU.
One process, several processes, gradient accumulation and a resumed run therefore see identical draws: there is no
generator state to save, to split or to lose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def first_sample_seed(seed: int) -> int:
    """Samples of run `seed` are drawn from seed·2³² on (below 2⁶², so that many more fit behind): runs share none."""
    return (seed << 32) % 2**62


def keyed_generator(seed: int, stream: str, step: int = 0, sample: int = 0, copy: int = 0) -> np.random.Generator:
    """A generator of its own for one (seed, stream, step, sample, copy).

    Args:
        seed: of the run, 0 … 2⁶⁴−1.
        stream: what the numbers are for ("noise", "timestep", "order", …); different names never share numbers.
        step: optimizer step, or epoch for a data order.
        sample: index of the sample in the global batch or data set, never in the local batch.
        copy: index of the noisy copy.
    """
    stream_key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    # The lowest counter word is left to the generator: it counts the numbers drawn under this key.
    bits = np.random.Philox(key=[seed, stream_key], counter=[0, copy, sample, step])
    return np.random.Generator(bits)


def normal(
    shape: Sequence[int], *, seed: int, stream: str, step: int, samples: Sequence[int], copies: int | None = None
) -> Tensor:
    """Standard normal draws, one key a sample (and a copy).

    Args:
        shape: of one sample (of one copy).
        samples: global sample indices, B of them.
        copies: K; None draws no copy axis.

    Returns:
        fp32 on the CPU, (B, *shape) or (B, K, *shape).
    """
    out = np.empty((len(samples), copies or 1, *shape), dtype=np.float32)
    for row, sample in enumerate(samples):
        for copy in range(copies or 1):
            keyed_generator(seed, stream, step, sample, copy).standard_normal(out=out[row, copy], dtype=np.float32)
    return torch.from_numpy(out if copies is not None else out[:, 0])


def uniform(
    shape: Sequence[int], *, seed: int, stream: str, step: int, samples: Sequence[int], copies: int | None = None
) -> Tensor:
    """Uniform draws in [0, 1), one key a sample (and a copy); arguments and shapes as in `normal`, in fp64."""
    out = np.empty((len(samples), copies or 1, *shape), dtype=np.float64)
    for row, sample in enumerate(samples):
        for copy in range(copies or 1):
            out[row, copy] = keyed_generator(seed, stream, step, sample, copy).random(tuple(shape))
    return torch.from_numpy(out if copies is not None else out[:, 0])


def permutation(n: int, *, seed: int, stream: str, step: int = 0) -> np.ndarray:
    """A permutation of 0 … n−1, keyed by (seed, stream, step): the data order of one epoch, for instance."""
    return keyed_generator(seed, stream, step).permutation(n)


def low_discrepancy(
    blocks: int, *, seed: int, stream: str, step: int, samples: Sequence[int], batch_size: int, copies: int = 1
) -> Tensor:
    """Uniform draws in [0, 1) that fill the interval evenly over a whole global batch (Kingma et al. 2021).

    The M = batch × copies × blocks draws of a step lie one in each M-th of the interval, uniformly inside it. Which
    block gets which M-th is a permutation: in order, low values would always go to the first samples and blocks.
    A single draw, and every subset chosen beforehand, is uniform.

    Args:
        blocks: N.
        seed, stream, step: of the key, as in `uniform`.
        samples: positions in the global batch, B of them, each below `batch_size`.
        batch_size: of the global batch.
        copies: C.

    Returns:
        (B, C, N) fp64 on the CPU.
    """
    total = batch_size * copies * blocks
    strata = permutation(total, seed=seed, stream=f"{stream}_strata", step=step).reshape(batch_size, copies, blocks)
    inside = uniform((blocks,), seed=seed, stream=stream, step=step, samples=samples, copies=copies)
    # (total − 1 + u) / total can round up to 1 where u is its largest value.
    return ((torch.from_numpy(strata[list(samples)]) + inside) / total).clamp_(max=1 - 2**-53)
