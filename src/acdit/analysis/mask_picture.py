"""The skip-causal mask as a picture (the paper's Figure 2), for any layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from acdit.mask import CLEAN, Streams, dense_mask

NOTHING, READS, CONDITIONS, OWN = (236, 239, 243), (47, 111, 176), (233, 163, 60), (214, 86, 60)
"""Colours of a pair: not attended; clean reads clean; noisy reads clean; noisy reads its own block."""
_INK, _LINE = (40, 44, 52), (150, 157, 168)
_LARGEST = 960


@dataclass(frozen=True)
class MaskPicture:
    """The picture, and where its pairs are: query i and key j fill the `cell`² pixels from (origin + j·cell, …)."""

    image: Image.Image
    origin: tuple[int, int]
    """Left, top."""
    cell: int
    """Pixels a token, or a block where tokens are too many to be seen."""
    unit: str
    """ "token" or "block"."""


def mask_picture(streams: Streams, cell: int | None = None, unit: str | None = None) -> MaskPicture:
    """Draw which query (rows) attends which key (columns).

    Args:
        streams: what stands on both axes.
        cell: pixels a unit; None: as many as fit.
        unit: "token" or "block", which is as exact: the rule does not look inside blocks. None: tokens where they fit.
    """
    tokens = streams.total * streams.block_tokens
    if unit is None:
        unit = "token" if tokens <= _LARGEST // 2 else "block"
    length = streams.block_tokens if unit == "token" else 1
    units = streams.total * length
    cell = cell or max(1, min(24, _LARGEST // units))
    pairs = Image.fromarray(_colours(streams, length)).resize((units * cell, units * cell), Image.Resampling.NEAREST)
    font = ImageFont.load_default(13)
    names = _names(streams)
    left = int(max(font.getlength(name) for name, _, _ in names)) + 20
    top = 34
    canvas = Image.new("RGB", (left + pairs.width + 12, top + pairs.height + 34), (255, 255, 255))
    canvas.paste(pairs, (left, top))
    draw = ImageDraw.Draw(canvas)
    for name, start, stop in names:
        middle = (start + stop) * length * cell / 2
        draw.text((left - 10, top + middle), name, _INK, font, anchor="rm")
        draw.text((left + middle, top - 10), name, _INK, font, anchor="mb")
    for edge in [start for _, start, _ in names] + [names[-1][2]]:  # outside of the pairs, which stay exact
        place = edge * length * cell
        draw.line((left - 8, top + place, left - 1, top + place), _LINE)
        draw.line((left + place, top - 8, left + place, top - 1), _LINE)
    _legend(draw, font, left, top + pairs.height + 12)
    return MaskPicture(canvas, (left, top), cell, unit)


def _colours(streams: Streams, length: int) -> np.ndarray:
    """(units, units, 3) uint8."""
    single = Streams(streams.num_clean, streams.num_blocks, streams.copies, 1, streams.window)
    allowed = dense_mask(single)
    clean = single.stream_of(torch.arange(single.total)) == CLEAN
    colours = torch.tensor(NOTHING, dtype=torch.uint8).expand(*allowed.shape, 3).clone()
    for chosen, colour in (
        (clean[:, None] & clean, READS), (~clean[:, None] & clean, CONDITIONS), (~clean[:, None] & ~clean, OWN)
    ):  # fmt: skip
        colours[allowed & chosen] = torch.tensor(colour, dtype=torch.uint8)
    return colours.repeat_interleave(length, 0).repeat_interleave(length, 1).numpy()


def _names(streams: Streams) -> list[tuple[str, int, int]]:
    """(name, first block, block after the last) of each stream."""
    names = [("clean", 0, streams.num_clean)] if streams.num_clean else []
    for copy in range(streams.copies):
        start = streams.num_clean + copy * streams.num_blocks
        name = "noisy" if streams.copies == 1 else f"noisy {copy + 1}"
        names.append((name, start, start + streams.num_blocks))
    return names


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, x: int, y: int) -> None:
    entries = ((READS, "clean reads clean"), (CONDITIONS, "noisy reads clean"), (OWN, "noisy reads its own block"))
    for colour, text in entries:
        width = int(font.getlength(text)) + 34
        if x + width > draw.im.size[0]:
            return  # a small picture has room for some only
        draw.rectangle((x, y, x + 12, y + 12), colour)
        draw.text((x + 18, y + 6), text, _INK, font, anchor="lm")
        x += width
