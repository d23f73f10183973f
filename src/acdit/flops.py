"""Floating-point operations in closed form: of a training step and of drawing a sample, part by part.

FLOPs count a multiply-add as two and matrix products only (linears and attention), the field's convention. A training
step computes 2N−1 blocks, of the clean ones in the last layer keys and values alone, and attends the allowed pairs
only, so nothing here is the dense figure of 2N blocks.

Shapes: B batch, C noisy copies, N blocks, L tokens a block, S = N·L, D token width, W hidden width, H heads, r MLP
ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.mask import Window, make_window

CHECKPOINTING = ("none", "elementwise", "layers")
FREQUENCIES = 256
"""Width of the timestep's sinusoid."""
_BACKWARD_OF_ATTENTION = 2.5
"""Products of attention's backward by its forward's: scores again, and four gradients' worth (5 against 2)."""


@dataclass(frozen=True)
class Architecture:
    """What a model's cost depends on."""

    layout: BlockLayout
    channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    window: Window | None = None
    vocab_size: int | None = None
    time_conditioning: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From the config of an `ACDiTTransformer`."""
        return cls(
            layout=BlockLayout(config["grid"], config["block"], config["patch"]),
            channels=config["in_channels"],
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            mlp_ratio=config["mlp_ratio"],
            num_classes=config["num_classes"],
            window=make_window(config.get("window"), config.get("sink_blocks", 0), "true", can_turn=True),
            vocab_size=config.get("vocab_size"),
            time_conditioning=config.get("time_conditioning", True),
        )

    def conditions(self, blocks: int) -> int:
        """Different adaLN conditions of so many noisy blocks: text without a timestep has one for all."""
        return 1 if not self.time_conditioning and self.num_classes is None else blocks

    @property
    def width(self) -> int:
        """W."""
        return self.num_heads * self.head_dim

    @property
    def inner(self) -> int:
        """Width inside the MLP, r·W."""
        return int(self.width * self.mlp_ratio)

    @property
    def token_dim(self) -> int:
        """Width of a token's prediction: D, or V of text."""
        return self.layout.token_dim(self.channels) if self.vocab_size is None else self.vocab_size

    @property
    def input_dim(self) -> int:
        """Width of a token that the embedder multiplies: D; 0 of text, whose ids are looked up."""
        return self.token_dim if self.vocab_size is None else 0

    @property
    def seen_blocks(self) -> int:
        """Pairs of a block and a clean block before it that it sees, of all N blocks: N·(N−1)/2 without a window."""
        return self._seen_before(self.layout.num_blocks)

    @property
    def seen_clean_blocks(self) -> int:
        """The same of the N−1 clean blocks that are read, each with itself."""
        read = self.layout.num_blocks - 1
        return self._seen_before(read) + read

    def _seen_before(self, blocks: int) -> int:
        if self.window is None:
            return blocks * (blocks - 1) // 2
        return sum(stop - start for block in range(blocks) for start, stop in self.window.segments(block))

    @property
    def theta(self) -> int:
        """Weights of a layer's products that every token goes through, 12·W² with the usual MLP: θ of the paper's
        section 4.4, biases, norms and adaLN aside."""
        return 4 * self.width**2 + 2 * self.width * self.inner

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: products, their biases, norms and adaLN."""
        w, inner = self.width, self.inner
        products = 4 * w * w + 4 * w + 2 * w * inner + inner + w
        return products + 2 * w + 2 * self.head_dim + 6 * w * w + 6 * w

    @property
    def parameters(self) -> int:
        """All parameters."""
        w, d = self.width, self.token_dim
        rows = d if self.vocab_size is None else d + 1  # the mask token's
        ends = rows * w + FREQUENCIES * w + w + w * w + w  # token and timestep embedders
        ends += w + 2 * w * w + 2 * w + w * d + d  # final layer
        labels = 0 if self.num_classes is None else (self.num_classes + 1) * w
        return ends + labels + self.num_layers * self.layer_parameters


@dataclass(frozen=True)
class FlopsByPart:
    """FLOPs of one sample, apart by what they are spent on."""

    transformer: float
    """The layers' linears on tokens: 2θ a token and layer."""
    attention: float
    """Scores and weighted sums over the allowed pairs."""
    adaln: float
    """The layers' six vectors and the final layer's two, a block."""
    embeddings: float
    """Of tokens and timesteps."""
    head: float
    """The final linear."""
    prefill: float = 0.0
    """Sampling: everything that reading finished blocks takes, attention included. In training clean blocks go through
    the same products as the noisy ones and are counted with them."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(asdict(self).values())

    @property
    def layers(self) -> float:
        """What the paper's section 4.4 counts: linears and attention of the layers."""
        return self.transformer + self.attention


def training_flops(arch: Architecture, batch: int, copies: int = 1, checkpointing: str = "none") -> float:
    """FLOPs of forward and backward of one training step; what checkpointing computes again is counted.

    Args:
        arch: the model.
        batch: samples, of all devices and micro-batches together.
        copies: noisy copies that share a clean pass.
        checkpointing: "layers" runs every layer's forward twice; the other modes repeat no product.
    """
    if checkpointing not in CHECKPOINTING:
        raise ConfigError("gradient_checkpointing", found=repr(checkpointing), expected=f"one of {CHECKPOINTING}")
    parts, w, noisy = forward_parts(arch, copies), arch.width, copies * arch.layout.num_blocks
    embedded = noisy if arch.time_conditioning else 1
    products = parts.total - parts.attention
    # What comes first has no input that wants a gradient.
    without_input_gradient = parts.embeddings - 2 * w * w * embedded
    flops = 3 * products - without_input_gradient + (1 + _BACKWARD_OF_ATTENTION) * parts.attention
    if checkpointing == "layers":
        flops += parts.layers + arch.num_layers * arch.conditions(noisy) * _adaln_of_a_layer(arch)
    return batch * flops


def picture_flops(arch: Architecture, steps: int = 25, guided: bool = True) -> float:
    """FLOPs of drawing one sample: the total of `sampling_parts`."""
    return sampling_parts(arch, steps, guided).total


def forward_parts(arch: Architecture, copies: int = 1) -> FlopsByPart:
    """FLOPs of a training forward, one sample.

    Args:
        arch: the model.
        copies: noisy copies that share a clean pass.
    """
    w, length, blocks, depth = arch.width, arch.layout.block_tokens, arch.layout.num_blocks, arch.num_layers
    clean, noisy = (blocks - 1) * length, copies * blocks * length
    noisy_pairs = copies * (arch.seen_blocks + blocks) * length**2
    clean_pairs = arch.seen_clean_blocks * length**2
    embedded = copies * blocks if arch.time_conditioning else 1  # not told t, all blocks share one vector
    return FlopsByPart(
        # In the last layer a clean token needs its key and value only: 2 of its 4 square products.
        transformer=2 * arch.theta * (noisy * depth + clean * (depth - 1)) + 4 * w * w * clean,
        attention=4 * w * (noisy_pairs * depth + clean_pairs * (depth - 1)),
        adaln=arch.conditions(copies * blocks) * (depth * _adaln_of_a_layer(arch) + 4 * w * w),
        embeddings=2 * arch.input_dim * w * (clean + noisy) + 2 * w * (FREQUENCIES + w) * embedded,
        head=2 * w * arch.token_dim * noisy,
    )


def sampling_parts(arch: Architecture, steps: int = 25, guided: bool = True) -> FlopsByPart:
    """FLOPs of drawing one sample alone: every block denoised in `steps` steps against the cache, then read once.

    Args:
        arch: the model.
        steps: model calls a block (a multistep solver makes one a step).
        guided: both branches of classifier-free guidance; they share the cache and the timestep's
            embedding.
    """
    w, length, blocks, depth = arch.width, arch.layout.block_tokens, arch.layout.num_blocks, arch.num_layers
    tokens, predictions = arch.layout.num_tokens, steps * (2 if guided else 1)
    embed = 2 * arch.input_dim * w
    read = (blocks - 1) * length * (2 * arch.theta * (depth - 1) + 4 * w * w + embed)
    return FlopsByPart(
        transformer=predictions * tokens * 2 * arch.theta * depth,
        attention=predictions * 4 * w * (arch.seen_blocks + blocks) * length**2 * depth,
        adaln=steps * blocks * arch.conditions(2 if guided else 1) * (depth * _adaln_of_a_layer(arch) + 4 * w * w),
        embeddings=predictions * tokens * embed + steps * blocks * 2 * w * (FREQUENCIES + w),
        head=predictions * tokens * 2 * arch.token_dim * w,
        prefill=read + 4 * w * arch.seen_clean_blocks * length**2 * (depth - 1),
    )


def layer_flops(arch: Architecture, full_sequence: bool = False) -> float:
    """FLOPs of one layer for one denoising step of all blocks (paper section 4.4): 2Sθ + 2WS² + 2WSL with a cache of
    all clean blocks, 2Sθ + 4WS² of the same sequence as one block."""
    tokens, length = arch.layout.num_tokens, arch.layout.num_tokens if full_sequence else arch.layout.block_tokens
    return 2 * tokens * arch.theta + 2 * arch.width * tokens * (tokens + length)


def saving(arch: Architecture) -> float:
    """Share of a layer's FLOPs that blocks save against one block: (1 − L/S) / (2 + θ/(WS)), below one half (paper
    section 4.4)."""
    tokens = arch.layout.num_tokens
    return (1 - arch.layout.block_tokens / tokens) / (2 + arch.theta / (arch.width * tokens))


def _adaln_of_a_layer(arch: Architecture) -> float:
    """Forward FLOPs of one vector's six."""
    return 12 * arch.width**2
