"""The pictures of docs/concepts.md, made by the library's own layout, mask, schedule and cache.

`python docs/tools/pictures.py` writes docs/images/concepts-*.png.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from acdit import ACDiTTransformer, BlockLayout
from acdit.analysis.mask_picture import CONDITIONS, OWN, READS, mask_picture
from acdit.corruption import GaussianCorruption
from acdit.mask import Streams

FOLDER = Path(__file__).parents[1] / "images"
_INK, _LINE, _PAPER = (40, 44, 52), (150, 157, 168), (255, 255, 255)
_BLOCKS = ((176, 206, 234), (248, 217, 172), (188, 222, 190), (240, 188, 176), (209, 196, 233), (225, 225, 225),
           (178, 223, 219), (255, 224, 178))  # fmt: skip
_FONT, _SMALL = ImageFont.load_default(14), ImageFont.load_default(11)


def block_order(layout: BlockLayout, cell: int = 34) -> Image.Image:
    """A grid of two axes: colours are blocks, numbers the places of tokens in the sequence."""
    rows, columns = layout.token_grid
    canvas = Image.new("RGB", (columns * cell + 2, rows * cell + 2), _PAPER)
    draw = ImageDraw.Draw(canvas)
    place = 0
    for block, positions in enumerate(layout.positions()):
        for row, column in positions.tolist():
            left, top = column * cell + 1, row * cell + 1
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), _BLOCKS[block % len(_BLOCKS)], _PAPER)
            draw.text((left + cell / 2, top + cell / 2), str(place), _INK, _SMALL, anchor="mm")
            place += 1
    return canvas


def frames(layout: BlockLayout, cell: int = 20) -> Image.Image:
    """A video's grid, a frame beside the other."""
    count, rows, columns = layout.token_grid
    step = columns * cell + 12
    canvas = Image.new("RGB", (count * step - 10, rows * cell + 24), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for block, positions in enumerate(layout.positions()):
        for frame, row, column in positions.tolist():
            left, top = frame * step + column * cell, row * cell
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), _BLOCKS[block % len(_BLOCKS)], _PAPER)
    for frame in range(count):
        draw.text((frame * step + columns * cell / 2, rows * cell + 14), f"frame {frame}", _INK, _SMALL, anchor="mm")
    return canvas


def layouts_picture() -> Image.Image:
    """An image, a video and a text under one rule."""
    image, video = block_order(BlockLayout((8, 8), (4, 4))), frames(BlockLayout((4, 4, 4), (2, 2, 4)))
    text = block_order(BlockLayout((1, 16), (1, 4)))
    canvas = Image.new("RGB", (700, 330), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for part, left, top, name in (
        (image, 0, 26, "image: grid (8, 8), block (4, 4)"),
        (video, 310, 26, "video: grid (4, 4, 4), block (2, 2, 4)"),
        (text.resize((384, 24), Image.Resampling.LANCZOS), 310, 200, "text: grid (16,), block (4,)"),
    ):
        draw.text((left, top - 10), name, _INK, _FONT, anchor="lm")
        canvas.paste(part, (left, top))
    return canvas


def noise_picture(columns: int = 6) -> Image.Image:
    """One clean block of a picture at timesteps from none to all noise: what `corrupt` makes of it."""
    corruption = GaussianCorruption()
    axis = torch.linspace(-1, 1, 16)
    distance = (axis[:, None].square() + axis.square()).sqrt()
    clean = torch.where((distance - 0.6).abs() < 0.18, 1.0, -0.9).reshape(1, 1, -1, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    cell, gap = 6, 14
    size = 16 * cell
    canvas = Image.new("RGB", (columns * (size + gap) - gap, size + 24), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        timestep = column * 999 // (columns - 1)
        noisy = corruption.corrupt(clean, noise, torch.tensor([[timestep]])).reshape(16, 16)
        gray = ((noisy.clamp(-1.6, 1.6) + 1.6) / 3.2 * 255).round().to(torch.uint8).numpy()
        block = Image.fromarray(gray).resize((size, size), Image.Resampling.NEAREST)
        canvas.paste(block.convert("RGB"), (column * (size + gap), 0))
        draw.text((column * (size + gap) + size / 2, size + 13), f"t = {timestep}", _INK, _FONT, anchor="mm")
    return canvas


def cache_picture() -> Image.Image:
    """What a request of four blocks computes, row after row, and how many bytes its cache then holds."""
    model = ACDiTTransformer(grid=(8, 8), block=(4, 4), in_channels=1, num_layers=2, num_attention_heads=2,
                             attention_head_dim=16)  # fmt: skip
    cache = model.new_cache(batch_size=1)
    layout, cell, left = model.layout, 46, 196
    rows: list[tuple[str, list[tuple[int, int, int]], int]] = []
    for block in range(layout.num_blocks):
        held = cache.num_blocks
        seen = [CONDITIONS] * held + [OWN]
        rows.append((f"denoise block {block}, every step", [*seen], cache.length))
        if block + 1 < layout.num_blocks:
            model.prefill(torch.zeros(1, 1, layout.block_tokens, model.token_dim), cache)
            rows.append((f"prefill block {block}, once", [_LINE] * held + [READS], cache.length))
    canvas = Image.new("RGB", (left + 4 * cell + 190, len(rows) * 34 + 78), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for block in range(layout.num_blocks):
        draw.text((left + block * cell + cell / 2, 14), f"block {block}", _INK, _SMALL, anchor="mm")
    draw.text((left + 4 * cell + 14, 14), "tokens in the cache after it", _INK, _SMALL, anchor="lm")
    for index, (name, colours, held) in enumerate(rows):
        top = 28 + index * 34
        draw.text((left - 12, top + 14), name, _INK, _FONT, anchor="rm")
        for block, colour in enumerate(colours):
            draw.rectangle((left + block * cell + 2, top, left + (block + 1) * cell - 2, top + 28), colour)
        draw.text((left + 4 * cell + 14, top + 14), str(held), _INK, _FONT, anchor="lm")
    legend = ((READS, "clean block: keys and values computed and kept"), (_LINE, "what it reads in the cache"),
              (OWN, "noisy block"), (CONDITIONS, "what it reads in the cache"))  # fmt: skip
    for index, (colour, text) in enumerate(legend):
        x, y = 12 + index % 2 * 300, 28 + len(rows) * 34 + 14 + index // 2 * 20
        draw.rectangle((x, y - 6, x + 12, y + 6), colour)
        draw.text((x + 18, y), text, _INK, _SMALL, anchor="lm")
    return canvas


def all_pictures() -> dict[str, Image.Image]:
    """File names and pictures."""
    layout = BlockLayout((4, 8), (4, 2))  # four blocks of 8 tokens
    streams = Streams(layout.num_blocks - 1, layout.num_blocks, 1, layout.block_tokens)
    return {
        "concepts-layouts.png": layouts_picture(),
        "concepts-noise.png": noise_picture(),
        "concepts-mask.png": mask_picture(streams, cell=10).image,
        "concepts-cache.png": cache_picture(),
    }


def as_png(picture: Image.Image) -> bytes:
    """Few colours in a palette: small files."""
    buffer = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    for name, picture in all_pictures().items():
        (FOLDER / name).write_bytes(as_png(picture))
        print(f"{name}: {(FOLDER / name).stat().st_size} bytes")
