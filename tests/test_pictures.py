from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.errors import ConfigError, DataError
from acdit.pictures import generation_gif, image_grid, loss_curve


def test_every_pixel_becomes_a_square_at_its_place() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    grid = np.asarray(image_grid(images, columns=2, scale=3, gap=2))
    assert grid.shape == (2 + 3 * (12 + 2), 2 + 2 * (18 + 2), 3)
    for index in range(5):
        row, column = divmod(index, 2)
        cell = grid[2 + row * 14 :, 2 + column * 20 :][:12, :18]
        assert np.array_equal(cell[::3, ::3], images[index].permute(1, 2, 0).numpy())
        assert np.array_equal(cell, cell[::3, ::3].repeat(3, axis=0).repeat(3, axis=1))
    assert (grid[2 + 28 :, 22:] == 255).all()  # the sixth place is empty


def test_floats_and_bytes_give_the_same_picture() -> None:
    values = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert image_grid(values, 2).tobytes() == image_grid(values / 255, 2).tobytes()
    assert image_grid(values, 2).tobytes() != image_grid(255 - values, 2).tobytes()


def test_tiny_pictures_are_enlarged_and_large_ones_left() -> None:
    assert image_grid(torch.zeros(1, 1, 8, 8), 1, gap=0).size == (64, 64)
    assert image_grid(torch.zeros(1, 1, 100, 70), 1, gap=0).size == (70, 100)


def test_labels_take_room_left_and_above_and_leave_the_pictures_alone() -> None:
    images = torch.rand(4, 1, 8, 8)
    plain = np.asarray(image_grid(images, 2))
    labelled = np.asarray(image_grid(images, 2, row_labels=["0", "1"], column_labels=["a", "b"]))
    top, left = (np.array(labelled.shape) - np.array(plain.shape))[:2]
    assert top > 0
    assert left > 0
    assert np.array_equal(labelled[top:, left:][4:, 4:], plain[4:, 4:])
    assert (labelled[:, :left] < 128).any()
    assert (labelled[:top] < 128).any()


@pytest.mark.parametrize(
    ("images", "arguments"),
    [
        (torch.zeros(0, 1, 4, 4), {"columns": 1}),
        (torch.zeros(2, 4, 4, 4), {"columns": 1}),
        (torch.zeros(2, 1, 4, 4), {"columns": 0}),
        (torch.zeros(2, 1, 4, 4), {"columns": 2, "row_labels": ["a", "b"]}),
    ],
)
def test_grids_that_make_no_sense_are_refused(images: torch.Tensor, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        image_grid(images, **arguments)


def test_the_film_shows_each_frame_with_a_box_around_the_block_at_work(tmp_path: Path) -> None:
    frames = [torch.full((2, 1, 8, 8), level) for level in (0.0, 0.4, 1.0)]
    boxes = [(0, 0, 4, 4), (4, 4, 4, 4), None]
    generation_gif(frames, boxes, tmp_path / "film.gif", columns=2, scale=10, frame_ms=50, hold_ms=900)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 3
    durations, coloured = [], []
    for index, level in enumerate((0, 102, 255)):
        film.seek(index)
        durations.append(film.info["duration"])
        page = np.asarray(film.convert("RGB")).astype(int)
        # The middle of the block that is not at work, in the first picture.
        assert abs(page[6 + 20, 6 + 60] - level).max() <= 4
        rows, columns = np.nonzero(page.max(axis=2) - page.min(axis=2) > 60)
        coloured.append((rows.min(), columns.min(), rows.max(), columns.max()) if len(rows) else None)
    assert durations == [50, 50, 900]
    assert coloured[0] == (5, 5, 46, 6 + 86 + 40)  # both pictures have the box, around pixels 6 … 45
    assert coloured[1] == (45, 45, 86, 6 + 86 + 80)
    assert coloured[2] is None


def test_a_film_needs_one_box_entry_a_frame(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        generation_gif([torch.zeros(1, 1, 8, 8)], [], tmp_path / "film.gif", columns=1)


def log(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_loss_curve_is_drawn_from_a_log_with_torn_and_foreign_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3}) for step in range(1, 200)]
    lines += ['{"step": 7, "conditional_accuracy": 0.5}', '{"step": 201, "lo', "[1]", '{"step": 202, "loss": NaN}']
    loss_curve(log(tmp_path / "log.jsonl", lines), tmp_path / "loss.png")
    picture = Image.open(tmp_path / "loss.png")
    assert picture.size == (900, 504)
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_one_point_and_losses_below_zero_are_drawn_too(tmp_path: Path) -> None:
    for index, losses in enumerate(([0.5], [0.5, -0.1, 0.0])):
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
        loss_curve(log(tmp_path / "log.jsonl", lines), tmp_path / f"loss{index}.png")
        assert (tmp_path / f"loss{index}.png").stat().st_size > 1000


def test_a_log_without_losses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no line with a step and a loss"):
        loss_curve(log(tmp_path / "log.jsonl", ['{"step": 1}']), tmp_path / "loss.png")


def test_matplotlib_is_loaded_only_to_draw_and_its_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, acdit.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"acdit\[train\]"):
        loss_curve("log.jsonl", "loss.png")
