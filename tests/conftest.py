"""Small models and data that the tests share."""

from __future__ import annotations

import pytest
import torch

from acdit import ACDiTTransformer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def awaken(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Random weights everywhere: a fresh model answers zero whatever it is asked."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tiny_model(
    grid: tuple[int, ...] = (8, 8),
    block: tuple[int, ...] = (4, 4),
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> ACDiTTransformer:
    """A few thousand random parameters, fp64."""
    settings = {
        "in_channels": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 5,
        **options,
    }  # fmt: skip
    model = ACDiTTransformer(grid=grid, block=block, **settings)
    return awaken(model).to(dtype)


def blocks_like(model: ACDiTTransformer, batch: int, copies: int | None = None) -> torch.Tensor:
    """Random blocks in the model's dtype: (B, N, L, D), or (B, K, N, L, D)."""
    layout = model.layout
    shape = (batch, *(() if copies is None else (copies,)), layout.num_blocks, layout.block_tokens, model.token_dim)
    return torch.randn(shape, dtype=model.x_embedder.weight.dtype)
