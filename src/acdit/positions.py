"""Where tokens are: a layout's coordinates as the rotations that attention turns queries and keys by.

Shapes: L tokens a block, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from acdit.attention import SinkRotation
from acdit.errors import ConfigError
from acdit.layers import Rope
from acdit.layout import BlockLayout
from acdit.mask import Window
from acdit.rope import default_split, require_form, rotation, segment_widths


class Positions:
    """Rotations of a layout's blocks; keeps no tensor.

    Args:
        layout: coordinates and extents come from it.
        head_dim: K.
        form: "axial", "reference", "1d" or "none"; see `acdit.rope`.
        split: proportion of the head dimension per axis; None: `default_split`.
        base: of the angles of every axis; None: `base_for_extent` of each.

    Raises:
        ConfigError: an unknown form, a split of another number of axes, a head dimension that does not split, a base
            that is not above 1 or that nothing would use.
    """

    def __init__(
        self, layout: BlockLayout, head_dim: int, form: str, split: Sequence[int] | None, base: float | None = None
    ) -> None:
        require_form(form)
        self.layout, self.head_dim, self.form, self.base = layout, head_dim, form, base
        if base is not None and (form == "none" or not 1 < base < math.inf):
            expected = "null: there are no positions" if form == "none" else "a number above 1, or null"
            raise ConfigError("rope_base", found=str(base), expected=expected)
        axes = 1 if form in ("1d", "none") else layout.ndim
        self.split = tuple(split) if split else default_split(axes)
        if len(self.split) != axes or (split and form == "none"):
            expected = f"{axes} parts, one per axis of the grid" if axes == layout.ndim else "null"
            raise ConfigError("rope_split", found=str(self.split), expected=f"{expected} with rope={form!r}")
        if form != "none":
            segment_widths(head_dim, self.split)

    def rope(self, first_block: int, num_blocks: int, dtype: torch.dtype, device: torch.device) -> Rope:
        """Rotations of consecutive blocks, (num_blocks, L, 1, K)."""
        if self.form == "1d":
            positions = self.layout.sequence_positions(first_block, num_blocks, device=device)
        else:
            positions = self.layout.positions(first_block, num_blocks, device=device)
        cos, sin = self._rotation(positions, dtype)
        return Rope(cos[:, :, None], sin[:, :, None], self.form)

    def sink_rotation(
        self, window: Window | None, first_block: int, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> SinkRotation | None:
        """How far queries of consecutive blocks see the sinks turned; None where none of them sees any moved.

        Sinks move by whole steps of the first axis: where a step holds several blocks, by as many as fit.
        """
        if window is None or not window.slide or self.form == "none":
            return None
        lags = torch.tensor([window.lag(block) for block in range(first_block, first_block + num_blocks)])
        if not bool(lags.any()):
            return None
        layout = self.layout
        if self.form == "1d":
            positions = (lags * layout.block_tokens)[:, None]
        else:
            blocks_a_step = layout.num_blocks // layout.block_grid[0]
            moved = lags // blocks_a_step * layout.block[0]
            positions = torch.stack([moved, *[torch.zeros_like(moved)] * (layout.ndim - 1)], dim=-1)
        cos, sin = self._rotation(positions.to(device), dtype)
        return SinkRotation(cos[:, None, None], sin[:, None, None], self.form)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        extents = (self.layout.num_tokens,) if self.form == "1d" else self.layout.token_grid
        return rotation(positions, self.head_dim, extents, self.split, self.form, dtype, self.base)
