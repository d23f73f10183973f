"""Video files that the tests of clips make: every frame carries its own number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="PyAV is in the extra video")

HEIGHT, WIDTH = 32, 64


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(count, height, width) uint8: a frame's number in binary, as 2 × 4 light and dark squares any codec keeps."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    squares = bits.reshape(count, 2, 4).astype(np.uint8) * 215 + 20
    return squares.repeat(height // 2, axis=1).repeat(width // 4, axis=2)


def numbers(clip: torch.Tensor) -> list[int]:
    """What the frames of a clip (C, T, H, W) carry."""
    count, height, width = clip.shape[1:]
    squares = clip.float().mean(0).reshape(count, 2, height // 2, 4, width // 4).mean((2, 4))
    return ((squares > 128).reshape(count, 8).long() << torch.arange(8)).sum(1).tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    rate: int = 25,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
) -> Path:
    """Encode frames (T, H, W) or (T, H, W, 3); `times` in 1/rate seconds, by default one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1
        for place, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="gray" if array.ndim == 2 else "rgb24")
            frame.pts, frame.time_base = (place if times is None else times[place]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def small_video(path: Path, count: int = 12, **options: Any) -> Path:
    """A few numbered frames; as AVI (MPEG-4) or MP4 (H.264), by the path's suffix."""
    codec = {".avi": "mpeg4", ".mp4": "libx264"}[path.suffix]
    return write_video(path, numbered(count), codec=codec, **options)
