"""The figures are those of `acdit.costs` and of the layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.app.anatomy import anatomy
from acdit.errors import ConfigError
from acdit.mask import Streams, dense_mask
from acdit.model import ACDiTTransformer


def test_the_paper_s_picture() -> None:
    found = anatomy(32, 32, 16, 16)
    figures = dict(found.figures)
    assert figures["tokens"] == "1,024 = 4 blocks × 256"
    with torch.device("meta"):
        model = ACDiTTransformer(grid=(32, 32), block=(16, 16), num_classes=1000).to(torch.bfloat16)
    assert figures["cache of one picture (bf16)"].startswith(f"{model.new_cache(1, 3).nbytes / 1e6:,.1f} MB")
    share = dense_mask(Streams(3, 4, 1, 1)).double().mean()
    assert figures["pairs attended, of all"] == f"{float(share):.1%}"
    assert found.order.size == (480, 480)


def test_one_block_and_many() -> None:
    assert dict(anatomy(8, 8, 8, 8).figures)["one block for all (plain diffusion)"].endswith("1.00 × as many")
    assert "64 blocks" in dict(anatomy(64, 16, 4, 4).figures)["tokens"]
    below = Image.new("RGB", (5, 5), (200, 10, 10))
    drawn = np.array(anatomy(4, 4, 2, 2, picture=below).order)
    assert (drawn == (200, 10, 10)).all(-1).mean() > 0.5


def test_the_blocks_of_a_clip_over_its_frames() -> None:
    found = anatomy(8, 8, 4, 8, frames=6, block_frames=2)
    figures = dict(found.figures)
    assert figures["tokens"] == "384 = 6 blocks × 64"
    with torch.device("meta"):
        model = ACDiTTransformer(grid=(6, 8, 8), block=(2, 4, 8), num_classes=1000).to(torch.bfloat16)
    assert figures["cache of one clip (bf16)"].startswith(f"{model.new_cache(1, 5).nbytes / 1e6:,.1f} MB")
    drawn = np.array(anatomy(8, 8, 4, 8, picture=Image.new("RGB", (5, 5)), frames=6, block_frames=2).order)
    gaps = (drawn == 255).all((0, 2)).nonzero()[0]  # white from top to bottom: between steps of time
    runs = np.split(gaps, (np.diff(gaps) > 1).nonzero()[0] + 1)
    assert sum(len(run) > 10 for run in runs) == 1  # two steps in a row; edges of frames are thin
    assert anatomy(8, 8, 8, 8, frames=16, block_frames=16).order.width <= 480
    assert anatomy(8, 8, 8, 8, frames=16, block_frames=1).order.height <= 480


def test_by_default_the_boundaries_are_drawn_on_a_digit() -> None:
    one, other = (np.array(anatomy(8, 8, *block).order) for block in ((4, 4), (4, 8)))
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 100  # not four colours and a line
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("given", "why"),
    [((0, 8, 1, 1), "height"), ((8, 65, 1, 1), "width"), ((8, 8, 3, 4), "divide"), ((64, 64, 2, 2), "blocks"),
     ((8, 8, 2.5, 2), "block height"), (("8", 8, 2, 2), "height"), ((None, 8, 2, 2), "height"),
     ((8, 8, math.nan, 2), "block height"), ((8, 8, 2, 2, "huge"), "size"), ((8, 8, 2, 2, "B", 10**9), "steps"),
     ((8, 8, 2, 2, "B", 25, True, None, 17), "frames"), ((8, 8, 2, 2, "B", 25, True, None, 4, 3), "divide"),
     ((8, 8, 2, 2, "B", 25, True, None, 1, 2), "divide")],
)  # fmt: skip
def test_out_of_bounds(given: tuple[object, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        anatomy(*given)
