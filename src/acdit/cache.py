"""Clean keys and values of one request.

The clean stream sees neither timestep nor label, so one cache serves the conditional and the unconditional branch of
guidance, every label and every timestep; it is written once per finished block. Storing one entry per sample instead
of one per sample and branch halves its memory.

Under a window the cache is a ring: a new block takes the place of the oldest one that nobody sees any more, so its
memory does not grow with the stream. Attention does not care in which order keys lie, and keys carry their positions,
so what is seen stays one contiguous range of the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from acdit.errors import ConfigError
from acdit.mask import Window


class KVCache:
    """Preallocated keys and values, owned by the caller and handed to `prefill` and `denoise`.

    Args:
        num_layers: layers of the transformer.
        batch_size: B, samples; guidance branches share their sample's entries.
        max_tokens: room, in tokens. The last block of a request has no reader, so (N−1)·L is enough for N blocks. Under
            a window there is room for what is seen and one block more, whatever is asked for.
        num_heads: H.
        head_dim: width of a head.
        block_tokens: L; the cache grows by whole blocks.
        dtype, device: of the stored keys and values.
        window: what is kept; None: everything.
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
        window: Window | None = None,
    ) -> None:
        if window is not None:
            max_tokens = (window.capacity + 1) * block_tokens
        # (B, T, H, K) to all who ask, but a head's tokens lie side by side in memory: attention reads head by head.
        shape = (batch_size, num_heads, max_tokens, head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(num_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(num_layers)]
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.block_tokens = block_tokens
        self.window = window
        self.length = 0
        """Clean tokens that every layer holds; queries see exactly these."""
        self._finished = 0
        self._sink_keys: list[Tensor] | None = None
        """Sinks' keys at their true positions, once the ones in sight have been turned."""

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    @property
    def num_blocks(self) -> int:
        """Finished blocks, held or forgotten: also the index of the block that comes next."""
        return self._finished

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
        if self.window is None and num_blocks * block_tokens > self.max_tokens:
            raise ConfigError(
                "cache", found=f"room for {self.max_tokens // block_tokens} blocks", expected=f"{num_blocks}",
                fix="model.new_cache(batch_size, num_blocks=…)",
            )  # fmt: skip

    def require_room(self, tokens: int) -> None:
        """Check before a read that `tokens` more fit; under a window they always do, a block at a time.

        Raises:
            ConfigError: they do not.
        """
        if self.window is None and self.length + tokens > self.max_tokens:
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
        """Make `tokens` written tokens visible; under a window it is one block, and the oldest is forgotten."""
        if self.window is not None and self.length == self.window.capacity * self.block_tokens:
            # The new block lies behind what is in sight: it takes the place of the one that goes out of sight.
            place = self.window.sinks + (self._finished - self.window.sinks) % self.window.blocks
            start, behind = place * self.block_tokens, slice(self.length, self.length + tokens)
            for buffer in (*self._keys, *self._values):
                buffer[:, start : start + tokens] = buffer[:, behind]
        else:
            self.length += tokens
        self._finished += tokens // self.block_tokens

    def turn_sinks(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Show the sinks at other positions: `turn` is given their keys (B, T, H, K) as they were written."""
        assert self.window is not None  # only a window has sinks
        tokens = self.window.sinks * self.block_tokens
        if self._sink_keys is None:
            self._sink_keys = [keys[:, :tokens].clone() for keys in self._keys]
        for keys, true in zip(self._keys, self._sink_keys, strict=True):
            keys[:, :tokens] = turn(true)

    def fork(self, copies: int) -> KVCache:
        """A new cache with `copies` samples for each one here, in sample-major order (s0, s0, …, s1, s1, …).

        The prefix is copied, so each sample can go on by itself: several futures from one past.

        Raises:
            ConfigError: fewer than one copy.
        """
        if copies < 1:
            raise ConfigError("copies", found=str(copies), expected="at least 1")
        child = self.like(self.batch_size * copies)
        ours, theirs = self.tensors(), child._buffers(self._sink_keys is not None)
        for name, held in ours.items():
            theirs[name][:, : held.shape[1]] = held.repeat_interleave(copies, dim=0)
        child.length, child._finished = self.length, self._finished
        return child

    def keep(self, samples: Sequence[int]) -> None:
        """Hold the given samples only, in their order; the memory of those that leave is given back, layer by layer.

        Raises:
            ConfigError: no sample, one that is not there, or one twice.
        """
        there = all(0 <= sample < self.batch_size for sample in samples)
        if not samples or not there or len(set(samples)) < len(samples):
            raise ConfigError(
                "samples", found=str(list(samples)), expected=f"some of 0 … {self.batch_size - 1}, each once"
            )
        for buffers in (self._keys, self._values, self._sink_keys or []):
            for layer, held in enumerate(buffers):
                by_head = held.transpose(1, 2)  # (B, H, T, K), as it lies in memory
                kept = by_head.new_empty((len(samples), *by_head.shape[1:]))
                seen = min(self.length, by_head.shape[2])  # what was never written is not touched
                kept[:, :, :seen] = by_head[list(samples), :, :seen]
                buffers[layer] = kept.transpose(1, 2)
        self.batch_size = len(samples)

    # --- as tensors, to be kept in a file ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, by name: (B, T, H, K) each, T the tokens in sight (of "sinks", theirs)."""
        return {
            name: buffer if name.startswith("sinks") else buffer[:, : self.length]
            for name, buffer in self._buffers(self._sink_keys is not None).items()
        }

    def facts(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors, as JSON."""
        return {"finished_blocks": self._finished, "length": self.length, "batch_size": self.batch_size}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over what `tensors` and `facts` of a cache like this one gave.

        Raises:
            ConfigError: of another cache.
        """
        turned = any(name.startswith("sinks") for name in tensors)
        buffers = self._buffers(turned)
        length = int(facts["length"])
        expected = {
            name: buffer.shape if name.startswith("sinks") else (*buffer.shape[:1], length, *buffer.shape[2:])
            for name, buffer in buffers.items()
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if {name: tuple(shape) for name, shape in found.items()} != {
            name: tuple(shape) for name, shape in expected.items()
        } or length > self.max_tokens:
            raise ConfigError(
                "kept cache", found="keys and values of other shapes", expected=f"those of {self.num_layers} layers, "
                f"{self.batch_size} samples, {length} tokens", fix="go on with the model and settings it is of",
            )  # fmt: skip
        for name, tensor in tensors.items():
            buffers[name][:, : tensor.shape[1]] = tensor
        self.length, self._finished = length, int(facts["finished_blocks"])

    def _buffers(self, with_sinks: bool) -> dict[str, Tensor]:
        """The buffers by name; the sinks' true keys are made room for when they are asked for."""
        named = {f"keys.{layer}": buffer for layer, buffer in enumerate(self._keys)}
        named |= {f"values.{layer}": buffer for layer, buffer in enumerate(self._values)}
        if with_sinks:
            if self._sink_keys is None:
                assert self.window is not None  # only a window has sinks
                tokens = self.window.sinks * self.block_tokens
                self._sink_keys = [keys[:, :tokens].clone() for keys in self._keys]
            named |= {f"sinks.{layer}": buffer for layer, buffer in enumerate(self._sink_keys)}
        return named

    def like(self, batch_size: int) -> KVCache:
        """An empty cache of the same kind, for so many samples."""
        keys = self._keys[0]
        return KVCache(
            self.num_layers, batch_size, self.max_tokens, keys.shape[2], keys.shape[3], self.block_tokens, keys.dtype,
            keys.device, self.window,
        )  # fmt: skip
