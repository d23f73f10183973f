"""Pictures of what a model does: grids of samples, loss curves, and a film of blocks appearing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from acdit.errors import ConfigError, DataError

_PAPER, _INK = (255, 255, 255), (40, 44, 52)
_ACCENT = (214, 86, 60)


def image_grid(
    images: Tensor,
    columns: int,
    scale: int | None = None,
    gap: int = 4,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures side by side, row after row, on white.

    Args:
        images: (M, C, H, W), uint8 or float in [0, 1], C 1 or 3.
        columns: pictures a row.
        scale: whole-number enlargement, each pixel a square; None: enough for 64 pixels a picture.
        gap: pixels between pictures, after enlargement.
        row_labels, column_labels: text left of rows, above columns.

    Raises:
        ConfigError: no images, channels other than 1 or 3, fewer than one column, labels of a wrong number.
    """
    pixels = as_bytes(images)
    if columns < 1 or len(pixels) == 0:
        raise ConfigError(
            "image grid", found=f"{len(pixels)} images in {columns} columns", expected="at least one of each"
        )
    rows = -(-len(pixels) // columns)
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ConfigError(name, found=f"{len(labels)} labels", expected=str(count))
    height, width = pixels.shape[2:]
    scale = max(1, 64 // max(height, width)) if scale is None else scale
    cell_height, cell_width = height * scale, width * scale
    font_size = max(11, min(18, cell_height // 4))
    font = ImageFont.load_default(font_size)
    left = gap + (max((int(font.getlength(text)) for text in row_labels), default=0) + 2 * gap if row_labels else 0)
    top = gap + (font_size + 2 * gap if column_labels else 0)
    size = (left + columns * (cell_width + gap), top + rows * (cell_height + gap))
    canvas = Image.new("RGB", size, _PAPER)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        place = (left + column * (cell_width + gap), top + row * (cell_height + gap))
        canvas.paste(_enlarged(picture, scale), place)
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels or ()):
        draw.text((left - 2 * gap, top + row * (cell_height + gap) + cell_height / 2), text, _INK, font, anchor="rm")
    for column, text in enumerate(column_labels or ()):
        draw.text((left + column * (cell_width + gap) + cell_width / 2, top - gap), text, _INK, font, anchor="mb")
    return canvas


def generation_gif(
    frames: Sequence[Tensor],
    active: Sequence[tuple[int, int, int, int] | None],
    path: str | Path,
    columns: int,
    scale: int | None = None,
    frame_ms: int = 60,
    hold_ms: int = 1500,
) -> None:
    """A film of pictures that appear block by block.

    Args:
        frames: each (M, C, H, W) in [0, 1] or uint8: the M pictures after one more denoising step.
        active: for each frame the block at work, (top, left, height, width) in pixels of the picture; it gets a
            frame around it. None: no block.
        path: where the GIF goes.
        columns: pictures a row.
        scale: whole-number enlargement; None: enough for 64 pixels a picture.
        frame_ms: how long a frame stands.
        hold_ms: how long the last one stands.

    Raises:
        ConfigError: no frames, or not one `active` for each.
    """
    if not frames or len(frames) != len(active):
        raise ConfigError("generation_gif", found=f"{len(frames)} frames, {len(active)} blocks", expected="one each")
    height, width = frames[0].shape[2:]
    scale = max(1, 64 // max(height, width)) if scale is None else scale
    gap = 6
    pages = []
    for frame, block in zip(frames, active, strict=True):
        page = image_grid(frame, columns, scale, gap)
        if block is not None:
            draw = ImageDraw.Draw(page)
            for index in range(len(frame)):
                row, column = divmod(index, columns)
                x = gap + column * (width * scale + gap) + block[1] * scale
                y = gap + row * (height * scale + gap) + block[0] * scale
                box = (x - 1, y - 1, x + block[3] * scale, y + block[2] * scale)
                draw.rectangle(box, outline=_ACCENT, width=2)
        pages.append(page)
    # One palette for all frames, taken from the whole film: no flicker, and gray stays gray.
    sample = Image.new("RGB", (pages[0].width, pages[0].height * 3))
    for place, page in enumerate((pages[0], pages[len(pages) // 2], pages[-1])):
        sample.paste(page, (0, place * page.height))
    palette = sample.quantize(colors=255)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    durations = [frame_ms] * (len(pages) - 1) + [hold_ms]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0)


def loss_curve(log_path: str | Path, path: str | Path, title: str = "Training loss") -> None:
    """Draw the loss (and the learning rate) of a run's log.jsonl.

    Args:
        log_path: lines of JSON objects; those with finite "step" and "loss" are drawn, others passed over.
        path: where the PNG goes.
        title: above the curve.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
        DataError: no line with a step and a loss.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a loss curve needs matplotlib: pip install 'acdit[train]'") from error
    records = log_records(Path(log_path))
    steps = [record["step"] for record in records]
    losses = torch.tensor([float(record["loss"]) for record in records], dtype=torch.float64)
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # explicit, so that no global backend is touched
    axes = figure.add_subplot()
    window = max(1, len(losses) // 25)
    axes.plot(steps, losses, color="#c9d3e0", linewidth=1, label="each logged step")
    smooth = losses.unfold(0, window, 1).mean(dim=1)
    axes.plot(steps[window - 1 :], smooth, color="#2f6fb0", linewidth=2, label=f"mean of {window}")
    if float(losses.min()) > 0:
        axes.set_yscale("log")
        for plain in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            plain(lambda value, _: f"{value:g}")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(True, which="both", color="#e8ebf0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    rates = [float(record["lr"]) for record in records if isinstance(record.get("lr"), int | float)]
    if len(rates) == len(records):
        right = axes.twinx()
        right.plot(steps, rates, color="#d6563c", linewidth=1, linestyle=":", label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(0, 1.15 * max(rates))
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        right.spines["top"].set_visible(False)
        axes.plot([], [], color="#d6563c", linewidth=1, linestyle=":", label="learning rate")
    axes.legend(loc="upper right", framealpha=1, edgecolor="white", bbox_to_anchor=(1, 0.9))
    figure.savefig(path)


def log_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl that have a step and a finite loss, one a step, in order.

    Raises:
        DataError: there is none.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            loss = record.get("loss")
            if isinstance(loss, int | float) and abs(loss) < float("inf"):
                records[record["step"]] = record  # a resumed run writes some steps twice; the later counts
    if not records:
        raise DataError(str(path), found="no line with a step and a loss", expected='lines like {"step": 1, "loss": …}')
    return [records[step] for step in sorted(records)]


def as_bytes(images: Tensor) -> Tensor:
    """Pictures, or the frames of a clip, as files keep them.

    Args:
        images: (M, C, H, W), uint8 or float in [0, 1], C 1 or 3.

    Returns:
        uint8 on the CPU, the same shape.

    Raises:
        ConfigError: another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ConfigError("images", found=f"shape {tuple(images.shape)}", expected="(M, C, H, W) with 1 or 3 channels")
    if images.dtype == torch.uint8:
        return images.cpu()
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _enlarged(picture: Tensor, scale: int) -> Image.Image:
    """uint8 (C, H, W) → PIL, every pixel a scale×scale square."""
    squares = picture.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    array = squares.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
