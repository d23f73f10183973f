"""BlockLayout against brute force, on any number of axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acdit import BlockLayout
from acdit.errors import ConfigError


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    ndim = draw(st.integers(1, 4))
    sizes = st.integers(1, 3)
    counts, block, patch = ([draw(sizes) for _ in range(ndim)] for _ in range(3))
    grid = [n * b * p for n, b, p in zip(counts, block, patch, strict=True)]
    return BlockLayout(grid, block, patch)


def blocks_by_hand(x: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Blocks in raster order, tokens in raster order inside, cells (patch, channel) inside a token: loops only."""
    out = []
    for sample in x:
        rows = []
        for corner in itertools.product(*(range(n) for n in layout.block_grid)):
            tokens = []
            for inside in itertools.product(*(range(b) for b in layout.block)):
                start = [(c * b + i) * p for c, b, i, p in zip(corner, layout.block, inside, layout.patch, strict=True)]
                cells = []
                for offset in itertools.product(*(range(p) for p in layout.patch)):
                    where = tuple(s + o for s, o in zip(start, offset, strict=True))
                    cells += [sample[(channel, *where)] for channel in range(x.shape[1])]
                tokens.append(torch.stack(cells))
            rows.append(torch.stack(tokens))
        out.append(torch.stack(rows))
    return torch.stack(out)


@given(layouts(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_blocks_are_cut_as_by_hand_and_put_back_exactly(layout: BlockLayout, channels: int) -> None:
    x = torch.randn(2, channels, *layout.grid)
    blocks = layout.to_blocks(x)
    assert blocks.shape == (2, layout.num_blocks, layout.block_tokens, layout.token_dim(channels))
    assert torch.equal(blocks, blocks_by_hand(x, layout))
    assert torch.equal(layout.from_blocks(blocks), x)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_positions_are_the_coordinates_of_the_tokens(layout: BlockLayout) -> None:
    tokens = BlockLayout(layout.token_grid, layout.block)
    axes = torch.meshgrid(*(torch.arange(size) for size in layout.token_grid), indexing="ij")
    expected = tokens.to_blocks(torch.stack(axes)[None])[0]
    assert torch.equal(layout.positions(), expected)


def test_text_is_a_grid_without_channels() -> None:
    layout = BlockLayout(12, 4)
    tokens = torch.arange(24).reshape(2, 12)
    blocks = layout.to_blocks(tokens)
    assert blocks.shape == (2, 3, 4)
    assert blocks[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(layout.from_blocks(blocks), tokens)


def test_blocks_beyond_the_grid_go_on_along_the_first_axis() -> None:
    short, long = BlockLayout((4, 4, 4), (2, 2, 4)), BlockLayout((12, 4, 4), (2, 2, 4))
    assert torch.equal(short.positions(2, 10), long.positions()[2:12])


@pytest.mark.parametrize(
    ("grid", "block", "patch", "names"),
    [
        ((8, 8), (3, 4), 1, ["(3, 4)", "(8, 8)", "[1, 2, 4, 8]"]),
        ((16, 32, 32), (4, 5, 16), (1, 2, 2), ["(4, 5, 16)", "(16, 16, 16)", "[1, 2, 4, 8, 16]"]),
        ((9, 9), (3, 3), 2, ["(2, 2)", "(9, 9)", "[1, 3, 9]"]),
    ],
)
def test_a_size_that_does_not_divide_names_both_and_lists_the_valid_ones(
    grid: tuple[int, ...], block: tuple[int, ...], patch: int, names: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        BlockLayout(grid, block, patch)
    for name in names:
        assert name in str(error.value)


def test_wrong_shapes_and_axes_are_refused() -> None:
    layout = BlockLayout((8, 8), (4, 4))
    for call in (
        lambda: BlockLayout((8, 8), (4,)),
        lambda: BlockLayout((8, 8), (4, 0)),
        lambda: layout.to_blocks(torch.zeros(1, 1, 8, 4)),
        lambda: layout.from_blocks(torch.zeros(1, 3, 16, 1)),
        lambda: BlockLayout((8, 8), (2, 2), 2).from_blocks(torch.zeros(1, 4, 4, 3)),
    ):
        with pytest.raises(ConfigError):
            call()


def test_layouts_are_values() -> None:
    assert BlockLayout([8, 8], [4, 4]) == BlockLayout((8, 8), (4, 4), (1, 1))
    assert hash(BlockLayout((8, 8), 4)) == hash(BlockLayout((8, 8), (4, 4)))
    with pytest.raises(AttributeError):
        BlockLayout(8, 4).grid = (4,)  # type: ignore[misc]


@pytest.mark.parametrize("grid", [(8.7, 8), ("8", "8"), "88", 8.0, (8, None)])
def test_sizes_are_integers_and_nothing_is_rounded_or_parsed(grid: object) -> None:
    with pytest.raises(ConfigError, match="positive integers"):
        BlockLayout(grid, (4, 4))
    assert BlockLayout((np.int64(8), 8), np.int32(4)) == BlockLayout((8, 8), (4, 4))
