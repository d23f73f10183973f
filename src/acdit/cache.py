"""Clean keys and values of one request.

The clean stream sees neither timestep nor label, so one cache serves the conditional and the unconditional branch of
guidance, every label and every timestep; it is written once per finished block. Storing one entry per sample instead
of one per sample and branch halves its memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acdit.errors import ConfigError


class KVCache:
    """Preallocated keys and values, owned by the caller and handed to `prefill` and `denoise`.

    Args:
        num_layers: layers of the transformer.
        batch_size: B, samples; guidance branches share their sample's entries.
        max_tokens: room, in tokens. The last block of a request has no reader, so (N−1)·L is enough for N blocks.
        num_heads: H.
        head_dim: width of a head.
        block_tokens: L; the cache grows by whole blocks.
        dtype, device: of the stored keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # (B, T, H, K) to all who ask, but a head's tokens lie side by side in memory: attention reads head by head.
        shape = (batch_size, num_heads, max_tokens, head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(num_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(num_layers)]
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.block_tokens = block_tokens
        self.length = 0
        """Clean tokens that every layer holds; queries see exactly these."""

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    @property
    def num_blocks(self) -> int:
        """Finished blocks held: also the index of the block that comes next."""
        return self.length // self.block_tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all layers, keys and values."""
        return sum(part.numel() * part.element_size() for part in (*self._keys, *self._values))

    def prefix(self, layer: int, extra_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Views of one layer's clean keys and values, (B, P, H, K) each.

        Args:
            layer: index of the layer.
            extra_tokens: tokens already written by `write` for blocks that are still being read.
        """
        end = self.length + extra_tokens
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def require_fits(self, block_tokens: int, num_layers: int, num_heads: int, num_blocks: int) -> None:
        """Check before a request that this is a cache for it: of such a model, with room for so many blocks in all.

        Raises:
            ConfigError: it is not.
        """
        own = (self.block_tokens, self.num_layers, self._keys[0].shape[2] if self._keys else 0)
        asked = (block_tokens, num_layers, num_heads)
        if own != asked:
            names = "tokens a block, layers, heads"
            raise ConfigError(
                f"cache ({names})", found=str(own), expected=str(asked), fix="make it with this model's new_cache"
            )
        if num_blocks * block_tokens > self.max_tokens:
            raise ConfigError(
                "cache", found=f"room for {self.max_tokens // block_tokens} blocks", expected=f"{num_blocks}",
                fix="model.new_cache(batch_size, num_blocks=…)",
            )  # fmt: skip

    def require_room(self, tokens: int) -> None:
        """Check before a read that `tokens` more fit.

        Raises:
            ConfigError: they do not.
        """
        if self.length + tokens > self.max_tokens:
            raise ConfigError(
                "KVCache is full",
                found=f"{self.length} tokens held and {tokens} to append",
                expected=f"at most {self.max_tokens}",
                fix="allocate more blocks: model.new_cache(batch_size, num_blocks=…)",
            )

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one layer's keys and values of new clean blocks, (B, T, H, K) each, after the prefix.

        They become part of the prefix when `advance` is called, once all layers have written.
        """
        end = self.length + keys.shape[1]
        self._keys[layer][:, self.length : end] = keys
        self._values[layer][:, self.length : end] = values

    def advance(self, tokens: int) -> None:
        """Make `tokens` written tokens visible."""
        self.length += tokens

    def fork(self, copies: int) -> KVCache:
        """A new cache with `copies` samples for each one here, in sample-major order (s0, s0, …, s1, s1, …).

        The prefix is copied, so each sample can go on by itself: several futures from one past.

        Raises:
            ConfigError: fewer than one copy.
        """
        if copies < 1:
            raise ConfigError("copies", found=str(copies), expected="at least 1")
        keys = self._keys[0]
        child = KVCache(
            self.num_layers, self.batch_size * copies, self.max_tokens, keys.shape[2], keys.shape[3],
            self.block_tokens, keys.dtype, keys.device,
        )  # fmt: skip
        for layer in range(self.num_layers):
            held_keys, held_values = self.prefix(layer)
            child.write(layer, held_keys.repeat_interleave(copies, dim=0), held_values.repeat_interleave(copies, dim=0))
        child.advance(self.length)
        return child
