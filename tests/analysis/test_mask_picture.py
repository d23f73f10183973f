"""The mask's picture against the rule of the paper's section 4.2 written out, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from acdit.analysis.mask_picture import CONDITIONS, NOTHING, OWN, READS, mask_picture
from acdit.mask import Streams, Window


def expected_colour(streams: Streams, query: int, key: int) -> tuple[int, int, int]:
    """Of two places on the block axis."""

    def known(index: int) -> tuple[int, int]:
        """(copy, block); copy −1 is clean."""
        if index < streams.num_clean:
            return -1, index
        return divmod(index - streams.num_clean, streams.num_blocks)

    (query_copy, query_block), (key_copy, key_block) = known(query), known(key)
    if key_copy == query_copy and key_block == query_block:
        return READS if key_copy == -1 else OWN
    window = streams.window
    seen = key_copy == -1 and key_block < query_block
    if window is not None:
        seen = seen and (query_block - key_block <= window.blocks or key_block < window.sinks)
    if not seen:
        return NOTHING
    return READS if query_copy == -1 else CONDITIONS


STREAMS = {
    "four squares": Streams(3, 4, 1, 4),
    "all 2N blocks": Streams(4, 4, 1, 2),
    "two copies": Streams(3, 4, 2, 3),
    "one block": Streams(0, 1, 1, 9),
    "window": Streams(7, 8, 1, 2, Window(2, 0)),
    "window, sinks and copies": Streams(7, 8, 3, 2, Window(2, 1)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("unit", ["token", "block"])
def test_every_pixel_is_the_rules(name: str, unit: str) -> None:
    streams = STREAMS[name]
    picture = mask_picture(streams, cell=3, unit=unit)
    length = streams.block_tokens if unit == "token" else 1
    pixels, (left, top) = np.asarray(picture.image), picture.origin
    side = streams.total * length * 3
    found = pixels[top : top + side, left : left + side]
    assert found.shape == (side, side, 3)
    for y in range(side):
        for x in range(side):
            expected = expected_colour(streams, y // 3 // length, x // 3 // length)
            assert tuple(found[y, x]) == expected, (y, x)


def test_cells_are_as_large_as_fit() -> None:
    small, large = mask_picture(Streams(3, 4, 1, 4)), mask_picture(Streams(3, 4, 1, 256))
    assert (small.unit, small.cell) == ("token", 24)
    assert (large.unit, large.cell) == ("block", 24)
    assert mask_picture(Streams(2047, 2048, 1, 1)).cell == 1
