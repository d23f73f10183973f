"""What a grid and a block mean: the mask, the order of the blocks, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from acdit import costs
from acdit.analysis.mask_picture import mask_picture
from acdit.app.requests import whole
from acdit.costs import Architecture
from acdit.data.digits import DigitsDataset
from acdit.data.moving import moving_digits
from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.mask import Streams
from acdit.model import PRESETS

LARGEST_GRID = 64
MOST_FRAMES = 16
MOST_BLOCKS = 256
MOST_STEPS = 1000
_EDGE = 480
_GAP = 12
_FRAMES_A_ROW = 4
_DIGIT = 5
_EARLY, _LATE = np.array([47, 111, 176]), np.array([233, 163, 60])
_INK, _LINE = (24, 28, 36), (255, 255, 255)


@dataclass(frozen=True)
class Anatomy:
    """Everything that follows from a grid and a block."""

    mask: Image.Image
    """Who attends whom in training: rows are queries."""
    order: Image.Image
    """The blocks in the order they are made, on a picture, or on the frames of a clip."""
    figures: tuple[tuple[str, str], ...]
    """(name, value), for a table."""


def anatomy(
    height: Any, width: Any, block_height: Any, block_width: Any, size: Any = "B", steps: Any = 25,
    guided: Any = True, picture: Image.Image | None = None, frames: Any = 1, block_frames: Any = 1,
) -> Anatomy:  # fmt: skip
    """Work it out.

    Args:
        height, width: tokens of the grid.
        block_height, block_width: tokens of a block; they must divide the grid.
        size: of the model, a name of `PRESETS`.
        steps: solver steps a block.
        guided: both branches of guidance.
        picture: what the blocks are drawn on; None: a digit, which moves in a clip.
        frames, block_frames: of a clip, and of a block of it, in tokens as well; one frame is a picture.

    Raises:
        ConfigError: numbers out of bounds, a block that does not divide, too many blocks to be shown.
    """
    grid = tuple(whole(name, value, 1, LARGEST_GRID) for name, value in (("height", height), ("width", width)))
    block = tuple(
        whole(name, value, 1, LARGEST_GRID)
        for name, value in (("block height", block_height), ("block width", block_width))
    )
    frames = whole("frames", frames, 1, MOST_FRAMES)
    block_frames = whole("block frames", block_frames, 1, MOST_FRAMES)
    if frames > 1 or block_frames > 1:
        grid, block = (frames, *grid), (block_frames, *block)
    what = "clip" if len(grid) == 3 else "picture"
    steps = whole("steps", steps, 1, MOST_STEPS)
    if not isinstance(size, str) or size not in PRESETS:
        raise ConfigError("size", found=f"{size!r:.40}", expected=f"one of {', '.join(PRESETS)}")
    layout = BlockLayout(grid, block)
    count = layout.num_blocks
    if count > MOST_BLOCKS:
        raise ConfigError("block", found=f"{count} blocks", expected=f"at most {MOST_BLOCKS}", fix="a larger block")
    arch, whole_arch = _architecture(size, layout), _architecture(size, BlockLayout(grid, grid))
    guided = bool(guided)
    memory = costs.sampling_memory(arch, 1, guided=guided, precision="bf16")
    flops, at_once = costs.picture_flops(arch, steps, guided), costs.picture_flops(whole_arch, steps, guided)
    every_block = 2 * layout.num_tokens * arch.width * arch.num_layers * 2
    figures = (
        ("tokens", f"{layout.num_tokens:,} = {count} blocks × {layout.block_tokens}"),
        ("pairs attended, of all", f"{_share(layout):.1%}"),
        (f"cache of one {what} (bf16)", f"{memory.cache / 1e6:,.1f} MB for both branches of guidance"),
        ("a block adds", f"{every_block / count / 1e6:,.2f} MB"),
        ("model calls", f"{count * steps:,} of {layout.block_tokens} tokens, and {count - 1} readings"),
        (f"FLOPs of one {what}", f"{flops:.3g}"),
        ("one block for all (plain diffusion)", f"{at_once:.3g}, {at_once / flops:.2f} × as many"),
    )
    streams = Streams(count - 1, count, 1, layout.block_tokens)
    mask = mask_picture(streams, max(2, _EDGE // streams.total), "block")  # as exact as tokens: see there
    below = mask.origin[1] + streams.total * mask.cell + 4  # what is drawn under the pairs is said beside the picture
    return Anatomy(mask.image.crop((0, 0, mask.image.width, below)), order_picture(layout, picture), figures)


def order_picture(layout: BlockLayout, picture: Image.Image | None = None) -> Image.Image:
    """The grid with its blocks numbered in the order they are made.

    Args:
        layout: of two axes, or of three: its frames then stand side by side, those of one step of time together.
        picture: drawn below the boundaries; None: a built-in digit, coloured from the first block to the last.
    """
    frames, a_block = (1, 1) if layout.ndim == 2 else (layout.token_grid[0], layout.block[0])
    if layout.ndim == 2:
        return _frame(layout, 0, _EDGE, picture, np.pad(DigitsDataset().images[_DIGIT, 0].numpy(), 1))
    steps_a_row = min(frames // a_block, max(1, _FRAMES_A_ROW // a_block))
    room = _EDGE - _GAP * (steps_a_row - 1)
    edge = room // (steps_a_row * a_block)
    clip = moving_digits(frames=frames, size=12)[0][0][0].numpy()
    drawn = [_frame(layout, frame, edge, picture, clip[frame]) for frame in range(frames)]
    width, height = drawn[0].size
    rows = -(-frames // (steps_a_row * a_block))
    a_step = width * a_block + _GAP
    size = (steps_a_row * a_step - _GAP, rows * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, _LINE)
    for index, one in enumerate(drawn):
        step, inside = divmod(index, a_block)
        row, place = divmod(step, steps_a_row)
        canvas.paste(one, (place * a_step + inside * width, row * (height + _GAP)))
    return canvas


def _frame(layout: BlockLayout, frame: int, edge: int, picture: Image.Image | None, digit: np.ndarray) -> Image.Image:
    """One frame, its longer edge of so many pixels."""
    tokens, (rows, columns) = layout.token_grid[-2:], layout.block_grid[-2:]
    scale = edge / max(tokens)
    height, width = (max(1, round(count * scale)) for count in tokens)
    first = 0 if layout.ndim == 2 else frame // layout.block[0] * rows * columns
    if picture is None:
        share = (first + np.arange(rows * columns).reshape(rows, columns, 1)) / max(1, layout.num_blocks - 1)
        colours = (_EARLY * (1 - share) + _LATE * share).astype(np.uint8)
        tint = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
        light = Image.fromarray(digit).resize((width, height), Image.Resampling.BICUBIC)
        canvas = Image.composite(Image.new("RGB", (width, height), _LINE), tint, light)
    else:
        canvas = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas, "RGBA")
    if scale >= 6:
        for axis, count in enumerate(tokens):
            for index in range(1, count):
                place = round(index * scale)
                draw.line((0, place, width, place) if axis == 0 else (place, 0, place, height), (255, 255, 255, 50))
    block_height, block_width = height / rows, width / columns
    size = int(min(28, 0.5 * min(block_height, block_width)))
    font = ImageFont.load_default(max(8, size))
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        left, top = column * block_width, row * block_height
        box = (left, top, min(width - 1, left + block_width), min(height - 1, top + block_height))
        draw.rectangle(box, outline=_INK, width=3)
        draw.rectangle(box, outline=_LINE, width=1)
        if size >= 8:
            middle = (left + block_width / 2, top + block_height / 2)
            draw.text(middle, str(first + index + 1), _LINE, font, anchor="mm", stroke_width=2, stroke_fill=_INK)
    return canvas


def _share(layout: BlockLayout) -> float:
    """Pairs that are attended in training, of all pairs of the two streams."""
    count = layout.num_blocks
    clean = (count - 1) * count // 2
    noisy = count * (count - 1) // 2 + count
    return (clean + noisy) / (2 * count - 1) ** 2


def _architecture(size: str, layout: BlockLayout) -> Architecture:
    preset = PRESETS[size]
    return Architecture(
        layout=layout, channels=4, num_layers=preset["num_layers"], num_heads=preset["num_attention_heads"],
        head_dim=preset["attention_head_dim"], num_classes=1000,
    )  # fmt: skip
