"""Uploads are judged; results carry their settings."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.app import files
from acdit.app.requests import Limits
from acdit.errors import ConfigError, DataError
from tests.app.served import image_model, video_model

SETTINGS = {"seed": 3, "block": [4, 4], "prompt": "é\n\"'", "switches": [[1, 2]]}


def test_a_picture_is_kept_to_the_pixel(tmp_path: Path) -> None:
    frame = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    data = files.png(frame, SETTINGS)
    (tmp_path / "a.png").write_bytes(data)
    assert files.settings_in(data).items() >= SETTINGS.items()
    assert np.array(Image.open(io.BytesIO(data))).shape == (256, 256)
    again = files.read_upload(image_model(), tmp_path / "a.png", 2, Limits())
    assert torch.equal(again[:, 0], frame)  # enlarged by whole pixels, and halved again


@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_a_clip_carries_its_settings(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = torch.randint(0, 256, (1, 6, 4, 4), dtype=torch.uint8)
    data = files.film(frames, SETTINGS, kind)
    assert files.settings_in(data).items() >= SETTINGS.items()
    (tmp_path / f"a.{kind}").write_bytes(data)
    again = files.read_upload(video_model(), tmp_path / f"a.{kind}", 2, Limits())
    assert again.shape == (1, 4, 4, 4)
    assert (again.int() - frames[:, :4].int()).abs().double().mean() < 20  # lossy
    with pytest.raises(DataError, match="frames"):
        files.read_upload(video_model(grid=(32, 4, 4)), tmp_path / f"a.{kind}", 9, Limits())
    with pytest.raises(ConfigError, match="gif or mp4"):
        files.film(frames, SETTINGS, "avi")


def test_a_text_ends_in_its_settings() -> None:
    data = files.text_file("one\ntwo", SETTINGS)
    assert data.startswith(b"one\ntwo\n")
    assert files.settings_in(data).items() >= SETTINGS.items()
    for nothing in (b"plain", b"acdit {broken", files.png(torch.zeros(1, 4, 4, dtype=torch.uint8), {})[:60]):
        with pytest.raises((DataError, OSError)):
            files.settings_in(nothing)


def test_bad_uploads_are_refused(tmp_path: Path) -> None:
    served, limits = image_model(), Limits(upload_bytes=1000)
    fine = io.BytesIO()
    Image.new("L", (8, 8)).save(fine, "PNG")
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xc3\x50\0\0\xc3\x50\x08\0\0\0\0" + b"\0" * 20
    for name, data, why in (
        ("a.exe", fine.getvalue(), ".exe"),
        ("a", fine.getvalue(), "without an ending"),
        ("a.svg", b"<svg/>", ".svg"),
        ("a.mp4", b"", ".mp4"),
        ("a.png", b"x" * 2000, "2,000 bytes"),
        ("b.png", b"no picture", "PNG|identify|upload"),
        ("c.png", fine.getvalue()[:40], "upload"),
        ("d.png", bomb, "upload"),
        ("e.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "upload"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=why):
            files.read_upload(served, tmp_path / name, 1, limits)


def test_a_picture_makes_a_still_clip(tmp_path: Path) -> None:
    Image.new("L", (9, 5), 70).save(tmp_path / "a.png")
    clip = files.read_upload(video_model(), tmp_path / "a.png", 2, Limits())
    assert clip.shape == (1, 4, 4, 4)
    assert bool((clip == 70).all())
