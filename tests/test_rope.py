"""RoPE over N axes: each segment is an ordinary RoPE; the reference's form as its weights need it."""

from __future__ import annotations

import math

import pytest
import torch

from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.rope import base_for_extent, default_split, rotate, rotation, segment_widths


def rope_1d_by_hand(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """One vector, textbook RoPE: pair i turns by position · base^(−2i/d)."""
    out = x.clone()
    for i in range(len(x) // 2):
        angle = position * base ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def test_each_segment_is_an_ordinary_rope() -> None:
    extents, split, head_dim = (16, 40, 64), (2, 3, 3), 64
    positions = torch.tensor([[3, 17, 60], [15, 0, 31]])
    x = torch.randn(2, head_dim, dtype=torch.float64)
    cos, sin = rotation(positions, head_dim, extents, split, "axial", torch.float64)
    out = rotate(x, cos, sin, "axial")
    assert segment_widths(head_dim, split) == (16, 24, 24)
    for row in range(2):
        start = 0
        for axis, width in enumerate((16, 24, 24)):
            expected = rope_1d_by_hand(
                x[row, start : start + width], int(positions[row, axis]), base_for_extent(extents[axis])
            )
            torch.testing.assert_close(out[row, start : start + width], expected, rtol=0, atol=1e-12)
            start += width


def test_scores_depend_on_the_offset_only() -> None:
    q, k = torch.randn(2, 32, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        turns = [rotation(torch.tensor(place), 32, (64, 64), (1, 1), "axial", torch.float64) for place in (a, b)]
        return rotate(q, *turns[0], "axial") @ rotate(k, *turns[1], "axial")

    here, there = score((5, 9), (2, 11)), score((105, 209), (102, 211))  # far beyond the extent as well
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def reference_form_by_hand(
    x: torch.Tensor, position: tuple[int, ...], extents: tuple[int, ...], split: tuple[int, ...]
) -> torch.Tensor:
    """Angles per axis as (f, f), features paired half against half of the whole head (spec section 3)."""
    angles: list[float] = []
    for coordinate, extent, width in zip(position, extents, segment_widths(len(x), split), strict=True):
        pairs = width // 2
        fs = [coordinate * base_for_extent(extent) ** -(i / (pairs - 1)) for i in range(pairs)]
        angles += fs + fs
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(len(x)):
        partner = -x[i + half] if i < half else x[i - half]
        out[i] = x[i] * math.cos(angles[i]) + partner * math.sin(angles[i])
    return out


@pytest.mark.parametrize(("extents", "split"), [((32, 32), (1, 1)), ((16, 16, 16), (2, 3, 3))])
def test_the_reference_form_pairs_across_the_whole_head(extents: tuple[int, ...], split: tuple[int, ...]) -> None:
    position = tuple(range(3, 3 + len(extents)))
    x = torch.randn(64, dtype=torch.float64)
    cos, sin = rotation(torch.tensor(position), 64, extents, split, "reference", torch.float64)
    torch.testing.assert_close(
        rotate(x, cos, sin, "reference"), reference_form_by_hand(x, position, extents, split), rtol=0, atol=1e-12
    )


def test_one_axis_form_is_textbook_rope_over_the_sequence() -> None:
    layout = BlockLayout((4, 4), (2, 2))
    positions = layout.sequence_positions(1, 2)
    assert positions.flatten().tolist() == list(range(4, 12))  # block order, not raster order
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    out = rotate(x, *rotation(positions, 16, (16,), (1,), "1d", torch.float64), "1d")
    for place in range(8):
        block, token = divmod(place, 4)
        expected = rope_1d_by_hand(x[block, token], 4 + place, base_for_extent(16))
        torch.testing.assert_close(out[block, token], expected, rtol=0, atol=1e-12)


def test_no_rope_is_the_identity() -> None:
    x = torch.randn(3, 4, 10)
    out = rotate(x, *rotation(torch.arange(12).reshape(3, 4, 1), 10, (12,), (1,), "none", torch.float32), "none")
    assert torch.equal(out, x)


def test_a_given_base_is_that_of_every_axis() -> None:
    x, position = torch.randn(16, dtype=torch.float64), (7, 5)
    turn = rotation(torch.tensor(position), 16, (8, 8), (1, 1), "axial", torch.float64, base=10_000)
    expected = torch.cat(
        [rope_1d_by_hand(part, place, 10_000) for part, place in zip(x.split(8), position, strict=True)]
    )
    torch.testing.assert_close(rotate(x, *turn, "axial"), expected, rtol=0, atol=1e-12)


def test_bases_follow_the_extent() -> None:
    assert base_for_extent(1024) == 2700
    assert base_for_extent(32) == 100
    assert base_for_extent(4096) == 10500
    # The paper's ceiling and the reference's floor-plus-one agree for every extent.
    for extent in range(1, 5000):
        assert base_for_extent(extent) == (int(8 * extent / math.pi) // 100 + 1) * 100


def test_splits_that_do_not_fit_are_refused() -> None:
    assert default_split(2) == (1, 1)
    assert default_split(3) == (2, 3, 3)
    with pytest.raises(ConfigError, match="multiple of 16"):
        segment_widths(40, (2, 3, 3))
    with pytest.raises(ConfigError, match="axial"):
        rotation(torch.zeros(1, 1), 8, (4,), (1,), "mystery", torch.float32)
