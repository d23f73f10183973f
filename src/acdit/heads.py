"""Classification heads: from the features of a transformer to logits, all at once or block by block.

A head pools tokens, normalises and answers with one linear. Pooling is a running average, so a head that has seen a few
blocks goes on with the next: what it says then is what it would have said of all of them at once.

Shapes: B batch, n blocks, L tokens a block, W hidden width, F = W × layers, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from acdit.cache import KVCache
from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError
from acdit.layers import RMSNorm, rms_norm, wide_dtype
from acdit.model import ACDiTTransformer
from acdit.safe_loading import SafetensorsOnly

POOLINGS = ("mean", "blocks", "attentive")
_EPS = 1e-6


class Pooled(NamedTuple):
    """A weighted average of the tokens seen so far, as what it takes to go on."""

    total: Tensor
    """(B, F): Σ weight × value."""
    weight: Tensor
    """(B, H, 1): Σ weight, over what `largest` scales."""
    largest: Tensor
    """(B, H, 1): the largest score so far; weights are exp(score − largest)."""


class ClassificationHead(SafetensorsOnly, ModelMixin, ConfigMixin):
    """Pooling, RMSNorm and a linear over features of a transformer.

    Args:
        width: W of the transformer.
        num_classes: logits.
        layers: whose features are read, side by side; see `ACDiTTransformer.encode`.
        pooling: "mean" of the tokens (a linear probe); "blocks": the mean of each block, side by side, zero of those
            that have not been seen; "attentive": a learned query's average of learned values.
        heads: H of the query.
        num_blocks: N, for "blocks".
        bidirectional: features are those of every block seeing every block.
        noise_timestep: features are those of the noisy stream at this timestep (the baseline DiT); None: clean ones.
        id2label: class names by index, as JSON keeps them (string keys).

    Raises:
        ConfigError: an unknown pooling, or heads that do not divide the features.
    """

    @register_to_config
    def __init__(
        self,
        width: int,
        num_classes: int,
        layers: Sequence[int] = (-1,),
        pooling: str = "mean",
        heads: int = 4,
        num_blocks: int = 1,
        bidirectional: bool = False,
        noise_timestep: float | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        features = width * len(layers)
        if pooling not in POOLINGS:
            raise ConfigError("classification.pooling", found=repr(pooling), expected=f"one of {POOLINGS}")
        if pooling == "attentive":
            if features % heads:
                raise ConfigError(
                    "classification.heads", found=str(heads), expected=f"a divisor of the {features} features"
                )
            self.query = nn.Parameter(torch.empty(heads, features // heads))
            self.key, self.value = nn.Linear(features, features), nn.Linear(features, features)
            nn.init.normal_(self.query, std=0.02)
        elif pooling == "blocks":
            features *= num_blocks
        self.norm = RMSNorm(features)
        self.linear = nn.Linear(features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def pool(self, features: Sequence[Tensor], before: Pooled | None = None) -> Pooled:
        """Average the tokens of blocks, going on from those `before`.

        Args:
            features: (B, n, L, W) of each layer.
        """
        tokens = torch.cat([layer.flatten(1, 2) for layer in features], dim=-1)
        tokens = tokens.to(wide_dtype(tokens.dtype))
        if self.config.pooling == "blocks":
            means = tokens.unflatten(1, features[0].shape[1:3]).mean(2).flatten(1)
            seen = means if before is None else torch.cat([before.total, means], dim=1)
            ones = means.new_ones(len(means), 1, 1)
            return Pooled(seen, ones, ones)
        if self.config.pooling == "mean":
            values, scores = tokens[:, :, None], tokens.new_zeros(*tokens.shape[:2], 1)
        else:
            tokens = rms_norm(tokens, torch.ones_like(tokens[0, 0]), _EPS)
            keys, values = (linear(tokens).unflatten(-1, self.query.shape) for linear in (self.key, self.value))
            scores = (keys * self.query).sum(-1) * self.query.shape[1] ** -0.5
        largest = scores.amax(dim=1)[..., None]
        if before is not None:
            largest = torch.maximum(largest, before.largest)
        weights = (scores[..., None] - largest[:, None]).exp()  # (B, T, H, 1)
        total, weight = (weights * values).sum(1).flatten(1), weights.sum(1)
        if before is not None:
            share = (before.largest - largest).exp()
            total = total + (before.total.unflatten(1, (share.shape[1], -1)) * share).flatten(1)
            weight = weight + before.weight * share
        return Pooled(total, weight, largest)

    def logits(self, pooled: Pooled) -> Tensor:
        """(B, num_classes)."""
        average = pooled.total.unflatten(1, (pooled.weight.shape[1], -1)) / pooled.weight
        flat = average.flatten(1)
        unseen = self.linear.in_features - flat.shape[1]  # of "blocks"
        return self.linear(self.norm(F.pad(flat, (0, unseen))))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, n, L, W) of each layer → (B, num_classes)."""
        return self.logits(self.pool(features))


class Classifier(nn.Module):
    """A transformer and the head that reads its features.

    Args:
        transformer: of continuous data.
        head: made for its width.
        corruption: how data become noisy, for a head with a `noise_timestep`.

    Raises:
        ConfigError: they do not fit.
    """

    def __init__(
        self, transformer: ACDiTTransformer, head: ClassificationHead, corruption: GaussianCorruption | None = None
    ) -> None:
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        if head.config.width != width:
            raise ConfigError(
                "classifier", found=f"a head for width {head.config.width}", expected=f"the model's width {width}"
            )
        if head.config.noise_timestep is not None and corruption is None:
            raise ConfigError(
                "classifier", found="features of the noisy stream, and no known corruption",
                expected="a model with a DDPM or flow schedule",
            )  # fmt: skip
        self.transformer, self.head, self.corruption = transformer, head, corruption

    @property
    def draws_noise(self) -> bool:
        """Whether features depend on noise."""
        return self.head.config.noise_timestep is not None

    def features(self, clean: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """(B, n, L, W) of each of the head's layers.

        Args:
            clean: (B, n, L, D).
            noise: like `clean`, where `draws_noise`.
        """
        config = self.head.config
        if not self.draws_noise:
            return self.transformer.encode(clean, config.layers, bidirectional=config.bidirectional)
        assert self.corruption is not None
        assert noise is not None
        timestep = torch.full(clean.shape[:2], config.noise_timestep, device=clean.device)
        if not self.corruption.is_flow:
            timestep = timestep.long()
        noisy = self.corruption.corrupt(clean, noise, timestep)
        return self.transformer.encode_noisy(clean, noisy, timestep, layers=config.layers)

    def forward(self, clean: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, N, L, D) → logits (B, num_classes)."""
        return self.head(self.features(clean, noise))

    def go_on(self, block: Tensor, cache: KVCache, before: Pooled | None = None) -> tuple[Tensor, Pooled]:
        """Logits once the next block is seen: what all blocks at once would give.

        Args:
            block: (B, 1, L, D), the block after those in `cache`; it is appended to it.
            cache: with room for all blocks but the last one, and for that one too if it is read.
            before: what came out for the blocks before.

        Raises:
            ConfigError: a head that needs all blocks at once.
        """
        config = self.head.config
        if config.bidirectional or self.draws_noise:
            kind = "bidirectional" if config.bidirectional else "noisy"
            raise ConfigError(
                "classifier", found=f"{kind} features", expected="block-causal ones, to go on from a cache"
            )
        pooled = self.head.pool(self.transformer.encode(block, config.layers, cache=cache), before)
        return self.head.logits(pooled), pooled

    def freeze_unused(self) -> None:
        """Take gradients from the parameters that no feature depends on: what serves generation only."""
        for name, parameter in self.transformer.named_parameters():
            clean_only = not self.draws_noise
            generation = name.startswith("final_layer") or (
                clean_only and ("modulation" in name or name.startswith(("t_embedder", "y_embedder")))
            )
            if generation or (name.startswith("layers.") and int(name.split(".")[1]) > self.depth):
                parameter.requires_grad_(False)

    @property
    def depth(self) -> int:
        """Index of the deepest layer that is read."""
        count = len(self.transformer.layers)
        return max(index % count for index in self.head.config.layers)
