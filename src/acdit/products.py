"""Matrix products in bf16 on processors that do not multiply bf16.

Most laptops hold bf16 but have no instruction to multiply it (no AMX, no AVX-512 BF16): torch's bf16 products then run
an order of magnitude slower than its fp32 ones. What a bf16 product means is the same everywhere: factors are bf16
numbers, each product of two of them is exact in fp32, sums are taken in fp32, the result is rounded to bf16. So it is
computed here by the fp32 units: the factors are widened, which is exact, multiplied, and the result is rounded. Only
the order of the fp32 additions differs from torch's own kernel. Weights and activations stay stored as bf16.

Everywhere else `Linear` is `torch.nn.Linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _multiplies_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this processor."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN: leave everything as torch has it
        return True


CPU_MULTIPLIES_BF16 = _multiplies_bf16()
"""Asked once: a constant for torch.compile."""


def through_fp32(x: Tensor) -> bool:
    """Whether products of x run on the fp32 units: x is bf16, or autocast makes it so, on a CPU that cannot."""
    if CPU_MULTIPLIES_BF16 or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32)
    return x.dtype == torch.bfloat16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, with bf16 products on the fp32 units where the CPU has no others.

    Args:
        x: (…, I).
        weight: (O, I), bf16; or fp32 under autocast, which rounds it.
        bias: (O,) or None.

    Returns:
        (…, O), in bf16 where the product is one of bf16.
    """
    if not through_fp32(x):
        return F.linear(x, weight, bias)
    return _bf16_linear(x.to(torch.bfloat16), weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _rounded(weight: Tensor) -> Tensor:
    """The bf16 value of a weight, widened to fp32."""
    return (weight if weight.dtype == torch.bfloat16 else weight.to(torch.bfloat16)).float()


# Registered as operators: one node under torch.compile, and selective checkpointing keeps the bf16 result.


@torch.library.custom_op("acdit::bf16_linear", mutates_args=(), device_types="cpu")
def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        wide_bias = None if bias is None else _rounded(bias)
        return F.linear(x.float(), _rounded(weight), wide_bias).to(torch.bfloat16)


@_bf16_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("acdit::bf16_linear_backward", mutates_args=(), device_types="cpu")
def _bf16_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (bf16), weight and bias (in the weight's dtype: fp32 ones are not rounded on the way)."""
    with torch.autocast("cpu", enabled=False):
        wide = grad.flatten(0, -2).float()
        grad_x = (wide @ _rounded(weight)).to(torch.bfloat16).reshape(x.shape)
        grad_weight = (wide.t() @ x.flatten(0, -2).float()).to(weight.dtype)
        grad_bias = wide.sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return grad_x, grad_weight, grad_bias


@_bf16_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0] if has_bias else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _bf16_linear_backward(grad.contiguous(), x, weight, ctx.has_bias)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


_bf16_linear.register_autograd(_backward, setup_context=_save_for_backward)
