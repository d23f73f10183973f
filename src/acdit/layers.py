"""The parts of the transformer: norm, embedder, projections, layer, final layer (paper section 4.3).

Shapes: B batch, C noisy copies, N blocks, M blocks on the block axis (clean ones first), L tokens a block, D token
width, W hidden width, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from acdit.attention import (
    SinkRotation,
    attend_all_blocks,
    attend_clean_blocks,
    attend_prefix_and_own,
    skip_causal_attention,
)
from acdit.cache import KVCache
from acdit.hooks import is_hooked, under_hooks
from acdit.mask import Streams
from acdit.products import Linear, linear
from acdit.rope import rotate


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 or the given dtype, whichever is wider: for norms, rotations and timestep embeddings."""
    return torch.promote_types(dtype, torch.float32)


class _EagerRMSNorm(torch.autograd.Function):
    """RMSNorm with its backward written out: eager CPU composes one from twenty passes over memory, this needs six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(weight.dtype)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(wide, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide_grad = grad.to(weight.dtype)
        normed = x.to(weight.dtype) * inverse
        product = wide_grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        # d norm / d x = (1 − x̂ x̂ᵀ / W) / rms
        projection = (product @ weight).unsqueeze(-1).mul_(inverse).div_(x.shape[-1])
        grad_x = torch.mul(wide_grad, inverse).mul_(weight).addcmul_(normed, projection, value=-1)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in fp32 or wider, in the dtype of x."""
    wide = wide_dtype(x.dtype)
    weight = weight.to(wide)
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EagerRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.to(wide), weight.shape, weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in fp32 or wider (paper section 4.3)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 features (cosines first, periods up to 10000), then an MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(Linear(frequency_size, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep (…), real or integer, 0 … 1000 → (…, W)."""
        weight_dtype = next(self.mlp.parameters()).dtype
        wide = wide_dtype(weight_dtype)  # bf16 cannot represent the integers above 256
        half = self.frequency_size // 2
        ramp = torch.arange(half, device=timestep.device, dtype=wide)
        frequencies = torch.exp(-math.log(10000.0) * ramp / half)
        angles = timestep[..., None].to(wide) * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight_dtype))


class Attention(nn.Module):
    """Projections of multi-head attention with QK-RMSNorm and RoPE; what attends what is the caller's business."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.proj = Linear(hidden_size, hidden_size)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, L, W) → q, k, v (…, L, H, K), q and k normalised and rotated."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self._place(q, self.q_norm, rope), self._place(k, self.k_norm, rope), v

    def keys_and_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What is left of `project` when nobody reads the output of these tokens: k and v alone."""
        if is_hooked(self.qkv) or type(self.qkv) is not Linear:
            # Offloaded, stored in another dtype, or replaced: then its weight is good only inside its own forward.
            _, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        else:
            width = x.shape[-1]
            bias = self.qkv.bias[width:]
            k, v = linear(x, self.qkv.weight[width:], bias).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self._place(k, self.k_norm, rope), v

    def output(self, attended: Tensor) -> Tensor:
        """(…, L, H, K) → (…, L, W)."""
        return self.proj(attended.flatten(-2))

    @staticmethod
    def _place(x: Tensor, norm: RMSNorm, rope: Rope) -> Tensor:
        # Norm and rotation stay in the wide dtype between them and are rounded once.
        return rotate(norm(x.to(rope.cos.dtype)), rope.cos, rope.sin, rope.form).to(x.dtype)


class MLP(nn.Module):
    """Two linears with a tanh-GELU."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@dataclass(frozen=True)
class Rope:
    """Cosines and signed sines of the tokens at hand, (…, L, 1, K), and the form they belong to."""

    cos: Tensor
    sin: Tensor
    form: str

    def blocks(self, start: int, stop: int | None = None) -> Rope:
        """Those of some blocks of the block axis."""
        return Rope(self.cos[start:stop], self.sin[start:stop], self.form)


@dataclass(frozen=True)
class Modulation:
    """adaLN-Zero's six vectors, one set a block, (…, 1, W) each: broadcast over tokens, never repeated."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN's affine map."""
    return torch.addcmul(shift, x, scale + 1)


class ACDiTLayer(nn.Module):
    """A DiT layer with RMSNorm and QK-norm; adaLN-Zero acts on noisy tokens only (paper section 4.3).

    Clean tokens go through the same weights unmodulated and ungated.
    """

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = MLP(hidden_size, inner_size)
        self.modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rope: Rope,
        streams: Streams,
        execution: str,
        last: bool,
        sinks: SinkRotation | None = None,
    ) -> Tensor:
        """Both streams of a training forward.

        Args:
            x: (B, M, L, W), clean blocks first.
            condition: (B, C·N, W), one vector a noisy block; (1, 1, W): one for all of them.
            rope: of all M blocks.
            streams: what stands on the block axis.
            execution: see `acdit.attention`.
            last: nobody reads the clean tokens' output: compute their keys and values only and drop them.
            sinks: how far the sinks are turned for each query block, where they slide with the window.

        Returns:
            (B, M, L, W), or (B, C·N, L, W) of the last layer.
        """
        clean = streams.num_clean
        if not last:
            modulation = self._modulation(condition, clean, x.shape[1] - clean)
            q, k, v = self.attn.project(self._attention_input(x, modulation), rope)
        else:
            context, x = x[:, :clean], x[:, clean:]
            modulation = self._modulation(condition)
            q, k, v = self.attn.project(self._attention_input(x, modulation), rope.blocks(clean))
            if clean:
                clean_k, clean_v = self.attn.keys_and_values(self.norm1(context), rope.blocks(0, clean))
                k, v = torch.cat([clean_k, k], dim=1), torch.cat([clean_v, v], dim=1)
        return self._update(x, skip_causal_attention(q, k, v, streams, execution, sinks), modulation)

    @under_hooks
    def read(self, x: Tensor, rope: Rope, cache: KVCache, index: int, last: bool) -> Tensor:
        """Clean blocks (B, n, L, W) against the cache; their keys and values are written to it."""
        tokens = x.shape[1] * x.shape[2]
        if last:
            k, v = self.attn.keys_and_values(self.norm1(x), rope)
            cache.write(index, k.flatten(1, 2), v.flatten(1, 2))
            return x
        q, k, v = self.attn.project(self.norm1(x), rope)
        cache.write(index, k.flatten(1, 2), v.flatten(1, 2))
        return self._update(x, attend_clean_blocks(q, *cache.prefix(index, tokens)), None)

    @under_hooks
    def encode(
        self,
        x: Tensor,
        rope: Rope,
        streams: Streams,
        execution: str,
        sinks: SinkRotation | None = None,
        bidirectional: bool = False,
    ) -> Tensor:
        """What `read` makes of clean blocks (B, n, L, W), without a cache; `streams` holds them alone."""
        q, k, v = self.attn.project(self.norm1(x), rope)
        if bidirectional:
            attended = attend_all_blocks(q, k, v)
        else:
            attended = skip_causal_attention(q, k, v, streams, execution, sinks)
        return self._update(x, attended, None)

    @under_hooks
    def denoise(self, x: Tensor, condition: Tensor, rope: Rope, cache: KVCache, index: int) -> Tensor:
        """One noisy block (G·B, L, W) against the cache and itself; the cache is only read."""
        modulation = self._modulation(condition)
        q, k, v = self.attn.project(self._attention_input(x, modulation), rope)
        return self._update(x, attend_prefix_and_own(q, k, v, *cache.prefix(index)), modulation)

    def _modulation(self, condition: Tensor, num_clean: int = 0, num_noisy: int = -1) -> Modulation:
        """The six vectors of each noisy block; behind those of clean ones, where there are any."""
        vectors = self.modulation(condition).unflatten(-1, (6, -1))
        if num_clean:
            # Clean blocks carry the identity: shift 0, scale 0, gate 1. Exact, and one tensor for both streams.
            identity = vectors.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
            clean = identity.expand(vectors.shape[0], num_clean, 6, vectors.shape[-1])
            vectors = torch.cat([clean, vectors.expand(-1, num_noisy, -1, -1)], dim=1)
        return Modulation(*(vector.unsqueeze(-2) for vector in vectors.unbind(-2)))

    def _attention_input(self, x: Tensor, modulation: Modulation) -> Tensor:
        return modulate(self.norm1(x), modulation.shift_attention, modulation.scale_attention)

    def _update(self, x: Tensor, attended: Tensor, modulation: Modulation | None) -> Tensor:
        update = self.attn.output(attended)
        if modulation is None:
            x = x + update
            return x + self.mlp(self.norm2(x))
        x = torch.addcmul(x, modulation.gate_attention, update)
        update = self.mlp(modulate(self.norm2(x), modulation.shift_mlp, modulation.scale_mlp))
        return torch.addcmul(x, modulation.gate_mlp, update)


class FinalLayer(nn.Module):
    """RMSNorm, adaLN and the linear to token width; noisy tokens only."""

    def __init__(self, hidden_size: int, token_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))
        self.linear = Linear(hidden_size, token_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (…, L, W), condition (…, W) → (…, L, D)."""
        shift, scale = self.modulation(condition).unsqueeze(-2).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))
