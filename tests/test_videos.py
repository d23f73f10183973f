"""Clips in files, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from acdit.errors import ConfigError
from acdit.videos import contact_sheet, open_writer, write_clip


def clip_of(frames: int = 5, channels: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    """Every frame of one brightness, every next one brighter."""
    levels = torch.linspace(20, 220, frames).to(torch.uint8)
    return levels[:, None, None, None].expand(frames, channels, height, width).contiguous()


def test_a_gif_has_every_frame_enlarged(tmp_path: Path) -> None:
    write_clip(clip_of(), tmp_path / "a.gif", "gif", fps=5)
    with Image.open(tmp_path / "a.gif") as film:
        pages = [np.asarray(page.convert("L")) for page in ImageSequence.Iterator(film)]
        assert film.info["duration"] == 200
    assert [page.shape for page in pages] == [(128, 128)] * 5
    assert [int(page.mean()) for page in pages] == clip_of()[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_mp4_has_every_frame_even_of_odd_sizes(channels: int, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = clip_of(7, channels, 129, 131)
    write_clip(clip, tmp_path / "a.mp4", "mp4", fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as film:
        stream = film.streams.video[0]
        assert float(stream.average_rate) == 12.5
        pages = [frame.to_ndarray(format="gray") for frame in film.decode(stream)]
    assert [page.shape for page in pages] == [(130, 132)] * 7
    for page, level in zip(pages, clip[:, 0, 0, 0].tolist(), strict=True):
        assert abs(float(page.mean()) - level) < 3


def test_an_mp4_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with open_writer(tmp_path / "a.mp4", "mp4", fps=2) as writer:
        for _ in range(20):
            writer.add(clip_of())
        with av.open(str(tmp_path / "a.mp4")) as film:
            assert sum(1 for _ in film.decode(video=0)) > 10
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 100


def test_frames_are_exact_and_go_on_behind_what_is_there(tmp_path: Path) -> None:
    clip = torch.randint(0, 256, (3, 3, 8, 6), dtype=torch.uint8)
    write_clip(clip[:2], tmp_path / "frames", "frames")
    write_clip(clip[2:], tmp_path / "frames", "frames")
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    for file, frame in zip(files, clip, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), frame.permute(1, 2, 0).numpy())


def test_a_contact_sheet_spreads_over_the_clip() -> None:
    clips = torch.stack([clip_of(9), clip_of(9).flip(0)])
    sheet = np.asarray(contact_sheet(clips, columns=3, row_labels=["a", "b"]).convert("L"))
    areas = {level: int((sheet == level).sum()) for level in (20, 45, 70, 120, 220)}
    assert areas[20] == areas[120] == areas[220] == 2 * 64 * 64
    assert max(areas[45], areas[70]) < 100  # edges of letters


def test_unknown_formats_and_missing_pyav_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="mp4"):
        open_writer(tmp_path / "a", "avi")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"acdit\[video\]"):
        open_writer(tmp_path / "a.mp4", "mp4")


def test_a_comment_is_kept_inside(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    write_clip(frames, tmp_path / "a.gif", "gif", comment='{"seed": 3}')
    write_clip(frames, tmp_path / "a.mp4", "mp4", comment='{"seed": 3}')
    assert Image.open(tmp_path / "a.gif").info["comment"] == b'{"seed": 3}'
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == '{"seed": 3}'


def test_floats_are_written_as_bytes_in_the_format_that_the_name_says(tmp_path: Path) -> None:
    clip = clip_of()
    for name in ("bytes.gif", "bytes"):
        write_clip(clip, tmp_path / name)
        write_clip(clip / 255, tmp_path / name.replace("bytes", "floats"))
    assert (tmp_path / "bytes.gif").read_bytes() == (tmp_path / "floats.gif").read_bytes()
    assert [path.name for path in sorted((tmp_path / "floats").iterdir())] == [f"{index:05d}.png" for index in range(5)]
    with Image.open(tmp_path / "floats" / "00003.png") as page:
        assert np.asarray(page).tolist() == clip[3, 0].tolist()
    with pytest.raises(ConfigError, match="webm"):
        write_clip(clip, tmp_path / "a.webm")
