"""Rotary position embedding over N axes (paper section 3.3, "RoPE-ND"): pure functions of positions.

The head dimension is split into one even segment per axis; a segment is an ordinary RoPE over its coordinate. Angles
are computed from the positions that are asked for, so there is no table that runs out.

Forms:

- ``"axial"``, the paper's: exponents −2(i−1)/d, pairs of neighbouring features inside each segment. A rotation, and
  relative along each axis.
- ``"reference"``, what the released weights were trained with: exponents run linspace(0, 1, d/2) and features are
  paired half against half of the *whole* head while angles are laid out per axis, so pairs mix axes. Neither a
  rotation nor relative; only for converted checkpoints.
- ``"1d"``: an ordinary RoPE over one coordinate, the token's place in the whole sequence in block order (an ablation
  of the paper's Figure 6). The caller hands in that coordinate as the only axis.
- ``"none"``: no positions at all (the other ablation): the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from acdit.errors import ConfigError

FORMS = ("axial", "reference", "1d", "none")


def base_for_extent(extent: int) -> float:
    """RoPE base of an axis with `extent` positions: 100·⌈8·extent/(100·π)⌉, so the slowest turn spans many extents."""
    return 100.0 * math.ceil(8 * extent / (100 * math.pi))


def require_form(form: str) -> None:
    """Refuse a form that is not one of `FORMS`."""
    if form not in FORMS:
        raise ConfigError("rope", found=repr(form), expected=f"one of {FORMS}")


def default_split(ndim: int) -> tuple[int, ...]:
    """Parts of the head dimension per axis: time gets 2 of 8 in a video, otherwise even."""
    return (2, 3, 3) if ndim == 3 else (1,) * ndim


def segment_widths(head_dim: int, split: Sequence[int]) -> tuple[int, ...]:
    """Even widths of the axes' segments in proportion to `split`; they sum to `head_dim`.

    Raises:
        ConfigError: the head dimension does not divide into even segments of that proportion.
    """
    unit, rest = divmod(head_dim, 2 * sum(split))
    if rest or unit == 0:
        raise ConfigError(
            f"rope_split {tuple(split)} does not divide the head dimension",
            found=f"attention_head_dim {head_dim}",
            expected=f"a multiple of {2 * sum(split)}",
            fix="change attention_head_dim or rope_split",
        )
    return tuple(2 * part * unit for part in split)


def rotation(
    positions: Tensor,
    head_dim: int,
    extents: Sequence[int],
    split: Sequence[int],
    form: str,
    dtype: torch.dtype,
    base: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate`.

    Args:
        positions: (…, A) integer or real coordinates, A axes.
        head_dim: K.
        extents: positions per axis in training; they only set the bases.
        split: proportion of the head dimension per axis.
        form: one of `FORMS`; "1d" is given one axis.
        dtype: fp32, or fp64 for fp64 models.
        base: of every axis, whatever its extent; None: `base_for_extent`.

    Returns:
        cos and sin, each (…, K); sin carries the sign of the feature's partner.
    """
    require_form(form)
    if form == "none":
        shape = (*positions.shape[:-1], head_dim)
        ones = torch.ones(shape, device=positions.device, dtype=dtype)
        return ones, torch.zeros_like(ones)
    angles: list[Tensor] = []
    for axis, width in enumerate(segment_widths(head_dim, split)):
        pairs = width // 2
        if form != "reference":
            exponents = torch.arange(pairs, device=positions.device, dtype=dtype) * (2.0 / width)
        else:
            # The reference's own arithmetic: a linspace over the head dimension, then divided by it.
            exponents = torch.linspace(0, head_dim, pairs, device=positions.device, dtype=dtype) / head_dim
        frequencies = 1.0 / (base_for_extent(extents[axis]) if base is None else base) ** exponents
        angles.append(positions[..., axis, None].to(frequencies.dtype) * frequencies)
    if form != "reference":
        angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
        sign = torch.tensor([-1.0, 1.0], device=positions.device, dtype=dtype).repeat(head_dim // 2)
    else:
        angle = torch.cat([half for axis_angles in angles for half in (axis_angles, axis_angles)], dim=-1)
        sign = torch.ones(head_dim, device=positions.device, dtype=dtype)
        sign[: head_dim // 2] = -1.0
    return angle.cos().to(dtype), angle.sin().to(dtype) * sign


def rotate(x: Tensor, cos: Tensor, sin: Tensor, form: str) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: (…, K); cos and sin broadcast against it and are at least as wide in dtype.
        form: the one `rotation` was called with: it says which feature is whose partner.

    Returns:
        Rotated x in the dtype of `cos`.
    """
    wide = x.to(cos.dtype)
    if form == "none":
        return wide
    if form != "reference":
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = wide.roll(x.shape[-1] // 2, dims=-1)
    return wide * cos + partner * sin
