"""How a grid is cut into blocks: the only place that knows block order, token shapes and positions.

An image's 16×16 square, a video's 4×16×16 whole frames or 4×8×8 frame parts and a text's span of 8 are one rule:
rectangular blocks in raster order, tokens in raster order inside a block, cells in raster order inside a token.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from acdit.errors import ConfigError

_MAX_EXTENT = 2**31 - 1


def _valid_sizes(extent: int) -> list[int]:
    small = [size for size in range(1, isqrt(extent) + 1) if extent % size == 0]
    return sorted({*small, *(extent // size for size in small)})


def _as_axes(name: str, value: int | Sequence[int], ndim: int | None = None) -> tuple[int, ...]:
    try:
        # operator.index takes every integer type and nothing that would have to be rounded or parsed.
        given = [operator.index(size) for size in value] if isinstance(value, Iterable) else operator.index(value)
    except TypeError:
        given = []
    axes = (given,) * (ndim or 1) if isinstance(given, int) else tuple(given)
    if not axes or any(size < 1 for size in axes):
        raise ConfigError(f"layout.{name}", found=repr(value), expected="positive integers, one per axis")
    if max(axes) > _MAX_EXTENT:
        raise ConfigError(f"layout.{name}", found=f"{max(axes)}", expected=f"at most {_MAX_EXTENT}")
    if ndim is not None and len(axes) != ndim:
        raise ConfigError(
            f"layout.{name}", found=f"{axes} ({len(axes)} axes)", expected=f"{ndim} axes, as many as the grid has"
        )
    return axes


@dataclass(frozen=True)
class BlockLayout:
    """An N-D grid of cells, patched into tokens, cut into rectangular autoregressive blocks.

    Args:
        grid: cells per axis, before patching: (32, 32) for a 32×32 latent, (16, 32, 32) for 16 such frames.
        block: tokens per axis of one block, after patching. It must divide the token grid.
        patch: cells per axis of one token; an int holds for every axis. It must divide the grid.

    Raises:
        ConfigError: a size that does not divide; the message names both sides and lists the valid sizes.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    patch: tuple[int, ...]

    def __init__(self, grid: int | Sequence[int], block: int | Sequence[int], patch: int | Sequence[int] = 1) -> None:
        grid_axes = _as_axes("grid", grid)
        patch_axes = _as_axes("patch", patch, len(grid_axes))
        block_axes = _as_axes("block", block, len(grid_axes))
        self._require_division("patch", patch_axes, "grid", grid_axes)
        tokens = tuple(cells // size for cells, size in zip(grid_axes, patch_axes, strict=True))
        self._require_division("block", block_axes, "token grid", tokens)
        object.__setattr__(self, "grid", grid_axes)
        object.__setattr__(self, "block", block_axes)
        object.__setattr__(self, "patch", patch_axes)

    @staticmethod
    def _require_division(part: str, sizes: tuple[int, ...], whole: str, extents: tuple[int, ...]) -> None:
        for axis, (size, extent) in enumerate(zip(sizes, extents, strict=True)):
            if extent % size:
                raise ConfigError(
                    f"layout.{part} {sizes} does not divide the {whole} {extents} along axis {axis}",
                    found=f"{extent} / {size}",
                    expected=f"one of {_valid_sizes(extent)}",
                    fix=f"choose a valid {part} size for axis {axis}, or change the grid",
                )

    @property
    def ndim(self) -> int:
        """Number of axes of the grid."""
        return len(self.grid)

    @property
    def token_grid(self) -> tuple[int, ...]:
        """Tokens per axis: the extents that RoPE's bases follow."""
        return tuple(cells // size for cells, size in zip(self.grid, self.patch, strict=True))

    @property
    def block_grid(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return tuple(tokens // size for tokens, size in zip(self.token_grid, self.block, strict=True))

    @property
    def num_blocks(self) -> int:
        """N."""
        return prod(self.block_grid)

    @property
    def block_tokens(self) -> int:
        """L, tokens a block."""
        return prod(self.block)

    @property
    def num_tokens(self) -> int:
        """S = N·L."""
        return self.num_blocks * self.block_tokens

    def token_dim(self, channels: int) -> int:
        """D, the width of a token of a grid with `channels` channels."""
        return channels * prod(self.patch)

    def positions(
        self, first_block: int = 0, num_blocks: int | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Token coordinates of consecutive blocks, (num_blocks, L, ndim) int64, in tokens.

        Blocks beyond the grid continue along the first axis: a stream of frames never runs out of positions.
        """
        count = self.num_blocks - first_block if num_blocks is None else num_blocks
        corner = torch.arange(count, device=device) + first_block
        inside = torch.arange(self.block_tokens, device=device)
        axes: list[Tensor] = []
        for axis in reversed(range(self.ndim)):
            # The first axis takes what is left over and is therefore unbounded.
            blocks_here = corner if axis == 0 else corner % self.block_grid[axis]
            axes.append(blocks_here[:, None] * self.block[axis] + (inside % self.block[axis])[None, :])
            corner = corner // self.block_grid[axis]
            inside = inside // self.block[axis]
        return torch.stack(axes[::-1], dim=-1)

    def sequence_positions(
        self, first_block: int = 0, num_blocks: int | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Places in the flattened sequence, block after block, (num_blocks, L, 1) int64: one axis instead of `ndim`."""
        count = self.num_blocks - first_block if num_blocks is None else num_blocks
        start = first_block * self.block_tokens
        places = torch.arange(start, start + count * self.block_tokens, device=device)
        return places.reshape(count, self.block_tokens, 1)

    def to_blocks(self, x: Tensor) -> Tensor:
        """Cut a grid into blocks of tokens.

        Args:
            x: (B, C, *grid) with channels, or (B, *grid) without (text; patch 1).

        Returns:
            (B, N, L, D) with D = C·∏patch ordered (patch cells, channel); (B, N, L) for a grid without channels.
        """
        channels = self._channels(x)
        cells = x[:, None] if channels is None else x
        split: list[int] = []
        for n, b, p in zip(self.block_grid, self.block, self.patch, strict=True):
            split += [n, b, p]
        cells = cells.reshape(*cells.shape[:2], *split)
        first = 2
        of_kind = [[first + 3 * axis + kind for axis in range(self.ndim)] for kind in range(3)]
        cells = cells.permute(0, *of_kind[0], *of_kind[1], *of_kind[2], 1)
        if channels is None:
            return cells.reshape(x.shape[0], self.num_blocks, self.block_tokens)
        return cells.reshape(x.shape[0], self.num_blocks, self.block_tokens, self.token_dim(channels))

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The exact inverse of `to_blocks`: (B, N, L, D) → (B, C, *grid), (B, N, L) → (B, *grid)."""
        if blocks.ndim not in (3, 4) or tuple(blocks.shape[1:3]) != (self.num_blocks, self.block_tokens):
            raise ConfigError(
                "BlockLayout.from_blocks",
                found=f"shape {tuple(blocks.shape)}",
                expected=f"(B, {self.num_blocks}, {self.block_tokens}), with or without a token width D at the end",
            )
        cells_a_token = prod(self.patch)
        width = blocks.shape[3] if blocks.ndim == 4 else 1
        if width % cells_a_token:
            raise ConfigError(
                "BlockLayout.from_blocks",
                found=f"token width {width}",
                expected=f"a multiple of ∏patch = {cells_a_token}",
            )
        channels = width // cells_a_token
        cells = blocks.reshape(-1, *self.block_grid, *self.block, *self.patch, channels)
        order = [0, cells.ndim - 1]
        for axis in range(self.ndim):
            order += [1 + axis, 1 + self.ndim + axis, 1 + 2 * self.ndim + axis]
        cells = cells.permute(order).reshape(-1, channels, *self.grid)
        return cells if blocks.ndim == 4 else cells[:, 0]

    def _channels(self, x: Tensor) -> int | None:
        if tuple(x.shape[1:]) == self.grid and all(size == 1 for size in self.patch):
            return None
        if x.ndim == self.ndim + 2 and tuple(x.shape[2:]) == self.grid:
            return x.shape[1]
        raise ConfigError(
            "BlockLayout.to_blocks",
            found=f"shape {tuple(x.shape)}",
            expected=f"(B, C, {', '.join(map(str, self.grid))}), or (B, {', '.join(map(str, self.grid))}) with patch 1",
        )
