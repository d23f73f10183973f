"""Gradient checkpointing that recomputes what is cheap: the backward computes norms, modulations, rotations and GELU
again and reads every matrix product from memory.

A layer keeps about 22 activations of width W a token for its backward; 11 of them are matrix products or attention.
Keeping only those costs one more pass over memory for the rest, which `torch.compile` fuses away. Use it through
diffusers' switch:

    model.enable_gradient_checkpointing(checkpoint_elementwise)   # this one
    model.enable_gradient_checkpointing()                         # diffusers': keeps a layer's input only
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import acdit.attention
import acdit.products  # noqa: F401 (both register operators named below)

_aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.linear.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
        torch.ops.acdit.blockwise_attention.default,
        torch.ops.acdit.bf16_linear.default,
    }
)
"""Operators whose outputs are kept: those that cost arithmetic, not memory traffic."""


def _policy(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_elementwise(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Run a layer and keep its matrix products and attention only; the same numbers, less memory.

    Args:
        layer: a layer or its forward, called as layer(*arguments); draws no random number.
        arguments: anything.

    Returns:
        What the layer returns. Gradients are the same to the bit in eager mode.
    """
    context = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=context)


class _AboutInPlaceOperators(logging.Filter):
    """torch.compile warns at every selective checkpoint that it must hold no in-place operators: ours holds none."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "context_fn is passed to torch.utils.checkpoint" not in str(record.msg)


logging.getLogger("torch._higher_order_ops.wrap").addFilter(_AboutInPlaceOperators())
