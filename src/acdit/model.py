"""The transformer: it reads clean blocks and denoises noisy ones with the same weights (paper sections 4.1–4.3).

    prefill: clean blocks + cache of the blocks before them → their keys and values, appended to the cache
    denoise: noisy block, timestep, label + cache           → the prediction for that block
    forward: both verbs for all blocks of a sequence at once, for training

Bottom-up: embedders, layer, final layer, model. Shapes: B batch, C noisy copies (the C of `noisy` is written K in the
paper's notation of copies), N blocks, M blocks on the block axis (clean ones first), L tokens a block, D token width,
W hidden width, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from acdit.attention import Streams, attend_clean_blocks, attend_prefix_and_own, skip_causal_attention
from acdit.cache import KVCache
from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.rope import default_split, rotate, rotation, segment_widths

PRESETS: dict[str, dict[str, int]] = {
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 18, "attention_head_dim": 64},
    "H": {"num_layers": 32, "num_attention_heads": 20, "attention_head_dim": 64},
}
"""Sizes of the paper's models (Table 5)."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 or the given dtype, whichever is wider: for norms, rotations and timestep embeddings."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in fp32 or wider (paper section 4.3)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = wide_dtype(x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 features (cosines first, periods up to 10000), then an MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

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
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, L, W) → q, k, v (…, L, H, K), q and k normalised and rotated."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self._place(q, self.q_norm, rope), self._place(k, self.k_norm, rope), v

    def keys_and_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What is left of `project` when nobody reads the output of these tokens: k and v alone."""
        width = x.shape[-1]
        bias = self.qkv.bias[width:]
        k, v = F.linear(x, self.qkv.weight[width:], bias).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self._place(k, self.k_norm, rope), v

    def output(self, attended: Tensor) -> Tensor:
        """(…, L, H, K) → (…, L, W)."""
        return self.proj(attended.flatten(-2))

    @staticmethod
    def _place(x: Tensor, norm: RMSNorm, rope: Rope) -> Tensor:
        # Norm and rotation stay in the wide dtype between them and are rounded once.
        wide = x.to(rope.cos.dtype)
        normed = F.rms_norm(wide, norm.weight.shape, norm.weight.to(wide.dtype), norm.eps)
        return rotate(normed, rope.cos, rope.sin, rope.form).to(x.dtype)


class MLP(nn.Module):
    """Two linears with a tanh-GELU."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

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
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope, streams: Streams, execution: str, last: bool) -> Tensor:
        """Both streams of a training forward.

        Args:
            x: (B, M, L, W), clean blocks first.
            condition: (B, C·N, W), one vector a noisy block.
            rope: of all M blocks.
            streams: what stands on the block axis.
            execution: see `acdit.attention`.
            last: nobody reads the clean tokens' output: compute their keys and values only and drop them.

        Returns:
            (B, M, L, W), or (B, C·N, L, W) of the last layer.
        """
        clean = streams.num_clean
        if not last:
            modulation = self._modulation(condition, clean)
            q, k, v = self.attn.project(self._attention_input(x, modulation), rope)
        else:
            context, x = x[:, :clean], x[:, clean:]
            modulation = self._modulation(condition, 0)
            q, k, v = self.attn.project(self._attention_input(x, modulation), rope.blocks(clean))
            if clean:
                clean_k, clean_v = self.attn.keys_and_values(self.norm1(context), rope.blocks(0, clean))
                k, v = torch.cat([clean_k, k], dim=1), torch.cat([clean_v, v], dim=1)
        return self._update(x, skip_causal_attention(q, k, v, streams, execution), modulation)

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

    def denoise(self, x: Tensor, condition: Tensor, rope: Rope, cache: KVCache, index: int) -> Tensor:
        """One noisy block (G·B, L, W) against the cache and itself; the cache is only read."""
        modulation = self._modulation(condition, 0)
        q, k, v = self.attn.project(self._attention_input(x, modulation), rope)
        return self._update(x, attend_prefix_and_own(q, k, v, *cache.prefix(index)), modulation)

    def _modulation(self, condition: Tensor, num_clean: int) -> Modulation:
        vectors = self.modulation(condition).unflatten(-1, (6, -1))
        if num_clean:
            # Clean blocks carry the identity: shift 0, scale 0, gate 1. Exact, and one tensor for both streams.
            identity = vectors.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
            clean = identity.expand(vectors.shape[0], num_clean, 6, vectors.shape[-1])
            vectors = torch.cat([clean, vectors], dim=1)
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
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, token_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (…, L, W), condition (…, W) → (…, L, D)."""
        shift, scale = self.modulation(condition).unsqueeze(-2).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


@dataclass
class ACDiTTransformerOutput(BaseOutput):
    """Output of `ACDiTTransformer`: `sample`, shaped like `noisy`."""

    sample: Tensor


class ACDiTTransformer(ModelMixin, ConfigMixin):
    """Blockwise autoregressive diffusion transformer (Hu et al., arXiv 2412.07720).

    It predicts and nothing else: it knows no scheduler, no guidance, no files, draws no random number and keeps no
    state between calls.

    Args:
        grid: cells per axis of the data, before patching: (32, 32), or (16, 32, 32) for video.
        block: tokens per axis of an autoregressive block.
        patch: cells per axis of a token; an int holds for every axis.
        in_channels: channels of the data.
        num_layers, num_attention_heads, attention_head_dim: size; see `PRESETS`. W = heads × head dim.
        mlp_ratio: inner width of the MLP over W.
        num_classes: classes of the label embedding, which gets one more row for "no label"; None: unconditional.
        rope: "axial" (the paper's) or "reference" (for converted checkpoints).
        rope_split: proportion of the head dimension per axis; None: even, and 2:3:3 for three axes.

    Raises:
        ConfigError: a block or patch that does not divide, a head dimension that does not split.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ACDiTLayer"]  # noqa: RUF012 (diffusers' class attribute convention)
    _repeated_blocks = ["ACDiTLayer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        patch: int | Sequence[int] = 1,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        rope: str = "axial",
        rope_split: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layout = BlockLayout(grid, block, patch)
        self.rope_split = tuple(rope_split) if rope_split else default_split(self.layout.ndim)
        if len(self.rope_split) != self.layout.ndim:
            raise ConfigError(
                "rope_split", found=str(self.rope_split), expected=f"{self.layout.ndim} parts, one per axis of the grid"
            )
        segment_widths(attention_head_dim, self.rope_split)
        hidden_size = num_attention_heads * attention_head_dim
        token_dim = self.layout.token_dim(in_channels)
        self.x_embedder = nn.Linear(token_dim, hidden_size, bias=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes is not None else None
        self.layers = nn.ModuleList(
            ACDiTLayer(hidden_size, num_attention_heads, int(hidden_size * mlp_ratio)) for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, token_dim)
        self.gradient_checkpointing = False
        self.attention_execution = "auto"
        """How `forward` attends: "auto", "sdpa", "flex" or "dense"; all give the same numbers."""
        self.initialize_weights()

    @property
    def null_label(self) -> int | None:
        """Label that means "no label", for guidance and label dropout; None of an unconditional model."""
        return self.config.num_classes

    @property
    def token_dim(self) -> int:
        """D."""
        return self.layout.token_dim(self.config.in_channels)

    def initialize_weights(self) -> None:
        """Xavier linears, N(0, 0.02) embeddings, zero adaLN and output: the model starts as "predict zero"."""
        for name, parameter in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.ones_(parameter)  # norms

    def new_cache(self, batch_size: int, num_blocks: int | None = None) -> KVCache:
        """An empty cache in the model's dtype and on its device.

        Args:
            batch_size: B samples; guidance branches need no room of their own.
            num_blocks: blocks it must hold; default N−1, since the last block has no reader.
        """
        blocks = self.layout.num_blocks - 1 if num_blocks is None else num_blocks
        return KVCache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            max_tokens=blocks * self.layout.block_tokens,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            block_tokens=self.layout.block_tokens,
            dtype=self.x_embedder.weight.dtype,
            device=self.x_embedder.weight.device,
        )

    def forward(
        self,
        clean: Tensor,
        noisy: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ACDiTTransformerOutput | tuple[Tensor]:
        """Denoise every noisy block against the clean blocks before it, in one pass (paper Figure 2a).

        Args:
            clean: (B, N, L, D), the context. Its last block has no reader and is not computed.
            noisy: (B, N, L, D), or (B, C, N, L, D) for C noisy copies that share the clean pass.
            timestep: broadcastable to (B, N) or (B, C, N): one a block.
            class_labels: (B,) or one a block, broadcastable like `timestep`; None: no label.
            return_dict: False gives a tuple.

        Returns:
            `sample`, the prediction, shaped like `noisy`.
        """
        self._require_blocks("clean", clean, 4)
        self._require_blocks("noisy", noisy, 5 if noisy.ndim == 5 else 4)
        copies = noisy if noisy.ndim == 5 else noisy[:, None]
        batch, num_copies, num_blocks, length, width = copies.shape
        if clean.shape[0] != batch:
            raise ConfigError("noisy", found=f"batch {batch}", expected=f"the batch of clean, {clean.shape[0]}")
        streams = Streams(num_blocks - 1, num_blocks, num_copies, length)
        context = clean[:, : streams.num_clean]
        x = self.x_embedder(torch.cat([context, copies.reshape(batch, -1, length, width).to(clean.dtype)], dim=1))
        shape = (batch, num_copies, num_blocks)
        condition = self._condition(timestep, class_labels, shape, keep_copies=noisy.ndim == 5).flatten(1, 2)
        rope = self._rope(0, num_blocks)
        order = [*range(streams.num_clean), *list(range(num_blocks)) * num_copies]
        rope = Rope(rope.cos[order], rope.sin[order], rope.form)
        last = len(self.layers) - 1
        for index, layer in enumerate(self._layers()):
            arguments = (x, condition, rope, streams, self.attention_execution, index == last)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, *arguments)
            else:
                x = layer(*arguments)
        sample = self.final_layer(x, condition).reshape(noisy.shape)
        return ACDiTTransformerOutput(sample=sample) if return_dict else (sample,)

    def prefill(self, clean: Tensor, cache: KVCache) -> None:
        """Read clean blocks: append their keys and values to the cache.

        Args:
            clean: (B, n, L, D), the n blocks that follow those in the cache.
            cache: of B samples, with room for n more blocks.

        Raises:
            ConfigError: a wrong shape, or a cache that is full.
        """
        self._require_blocks("clean", clean, 4, num_blocks=clean.shape[1])
        tokens = clean.shape[1] * clean.shape[2]
        cache.require_room(tokens)
        x = self.x_embedder(clean)
        rope = self._rope(cache.num_blocks, clean.shape[1])
        last = len(self.layers) - 1
        for index, layer in enumerate(self._layers()):
            x = layer.read(x, rope, cache, index, index == last)
        cache.advance(tokens)

    def denoise(self, noisy: Tensor, timestep: Tensor | float, class_labels: Tensor | None, cache: KVCache) -> Tensor:
        """Predict for the noisy block that follows the blocks in the cache; the cache is only read.

        Args:
            noisy: (G·B, L, D) for a cache of B samples: G guidance branches, branch-major, share its entries.
            timestep: scalar, or (G·B,).
            class_labels: (G·B,), or None: no label.
            cache: what `prefill` has read so far.

        Returns:
            (G·B, L, D).
        """
        batch = noisy.shape[0]
        if noisy.ndim != 3 or tuple(noisy.shape[1:]) != (self.layout.block_tokens, self.token_dim):
            raise ConfigError(
                "noisy",
                found=f"shape {tuple(noisy.shape)}",
                expected=f"(G·B, {self.layout.block_tokens}, {self.token_dim})",
            )
        if batch % cache.batch_size:
            raise ConfigError("noisy", found=f"batch {batch}", expected=f"a multiple of the cache's {cache.batch_size}")
        x = self.x_embedder(noisy)
        condition = self._condition(timestep, class_labels, (batch,))
        rope = self._rope(cache.num_blocks, 1)
        rope = Rope(rope.cos[0], rope.sin[0], rope.form)
        for index, layer in enumerate(self._layers()):
            x = layer.denoise(x, condition, rope, cache, index)
        return self.final_layer(x, condition)

    def _layers(self) -> Iterator[ACDiTLayer]:
        return cast(Iterator[ACDiTLayer], iter(self.layers))

    def _condition(
        self, timestep: Tensor | float, class_labels: Tensor | None, shape: tuple[int, ...], keep_copies: bool = False
    ) -> Tensor:
        """emb(t) + emb(label), (*shape, W): one vector a block."""
        device = self.x_embedder.weight.device
        t = torch.as_tensor(timestep, device=device)
        embedded = self.t_embedder(self._spread(t, shape, keep_copies))
        if self.y_embedder is None:
            if class_labels is not None:
                raise ConfigError("class_labels", found="labels", expected="None: this model is unconditional")
            return embedded.expand(*shape, -1)
        if class_labels is None:
            class_labels = torch.tensor(self.config.num_classes, device=device)
        labels = self.y_embedder(self._spread(class_labels.to(device), shape, keep_copies))
        return (embedded + labels).expand(*shape, -1)

    @staticmethod
    def _spread(value: Tensor, shape: tuple[int, ...], keep_copies: bool) -> Tensor:
        """A value per sample, per block or per copy and block, with size-1 axes where it does not vary."""
        if value.ndim == 0:
            return value.reshape((1,) * len(shape))
        if value.ndim == 1:
            return value.reshape(-1, *(1,) * (len(shape) - 1))
        if value.ndim == 2 and len(shape) == 3:
            return value[:, None]
        if value.ndim == len(shape) and keep_copies:
            return value
        raise ConfigError("timestep or class_labels", found=f"shape {tuple(value.shape)}", expected=f"up to {shape}")

    def _rope(self, first_block: int, num_blocks: int) -> Rope:
        """Rotations of consecutive blocks, (num_blocks, L, 1, K)."""
        weight = self.x_embedder.weight
        positions = self.layout.positions(first_block, num_blocks, device=weight.device)
        cos, sin = rotation(
            positions,
            self.config.attention_head_dim,
            self.layout.token_grid,
            self.rope_split,
            self.config.rope,
            wide_dtype(weight.dtype),
        )
        return Rope(cos[:, :, None], sin[:, :, None], self.config.rope)

    def _require_blocks(self, name: str, x: Tensor, ndim: int, num_blocks: int | None = None) -> None:
        blocks = self.layout.num_blocks if num_blocks is None else num_blocks
        tail = (blocks, self.layout.block_tokens, self.token_dim)
        if x.ndim != ndim or tuple(x.shape[-3:]) != tail:
            raise ConfigError(
                name,
                found=f"shape {tuple(x.shape)}",
                expected=f"(B, {', '.join(map(str, tail))})"
                + (", or (B, C, …) for C noisy copies" * (name == "noisy")),
                fix="cut the data with model.layout.to_blocks",
            )
