"""A tiny model of tokens and what it can be held against: everything enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import comb

import torch

from acdit import ACDiTTransformer
from tests.conftest import tiny_model

VOCAB = 3


def text_model(
    tokens: int = 6, block: int = 3, vocab: int = VOCAB, std: float = 0.3, **options: object
) -> ACDiTTransformer:
    """fp64, with predictions far from uniform."""
    settings = {"num_classes": None, "in_channels": 4, "vocab_size": vocab, "time_conditioning": False, **options}
    model = tiny_model((tokens,), (block,), **settings)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(10 * std)
        model.x_embedder.weight.mul_(10 * std)
    return model


def subsets(length: int) -> Iterator[tuple[int, ...]]:
    """All non-empty sets of places."""
    for size in range(1, length + 1):
        yield from itertools.combinations(range(length), size)


@torch.no_grad()
def masked_entropy(model: ACDiTTransformer, clean: torch.Tensor, block: int, places: tuple[int, ...]) -> torch.Tensor:
    """CE at the masked places of one block, against its clean past; through `denoise`, not `forward`. (B, L)"""
    batch, _, length = clean.shape
    cache = model.new_cache(batch)
    if block:
        model.prefill(clean[:, :block], cache)
    noisy = clean[:, block].clone()
    noisy[:, list(places)] = model.mask_token
    log_p = model.denoise(noisy, 0.0, None, cache).log_softmax(-1)
    entropy = -log_p.gather(-1, clean[:, block][..., None])[..., 0]
    keep = torch.zeros(length, dtype=torch.bool)
    keep[list(places)] = True
    return entropy * keep


def exact_bound(model: ACDiTTransformer, clean: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """(B, N, L): E over t uniform on [low, high] and masks of CE/t, by enumeration of the masks.

    A set of m of L places is masked with probability tᵐ(1−t)ᴸ⁻ᵐ; the integral over t is exact (a polynomial).
    """
    _, blocks, length = clean.shape
    out = torch.zeros(clean.shape, dtype=torch.float64)
    for block in range(blocks):
        for places in subsets(length):
            m = len(places)
            weight = sum(
                comb(length - m, k) * (-1) ** k * (high ** (m + k) - low ** (m + k)) / (m + k)
                for k in range(length - m + 1)
            ) / (high - low)
            out[:, block] += weight * masked_entropy(model, clean, block, places)
    return out
