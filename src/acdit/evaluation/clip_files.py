"""One clip in a file or a folder of frames → its first frames, without trusting the file."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acdit.data.picture import MAX_PIXELS, BadPicture, decode_picture, resize_and_crop
from acdit.errors import ConfigError, first_line

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".gif")
# A closed list: FFmpeg also knows formats that open other files and addresses (playlists, concatenations).
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm"


@dataclass(frozen=True)
class ClipCut:
    """Which frames of a clip are measured: the first ones, every `stride`-th.

    The first, because a model's drift is counted from the start of its clips; a stride is StyleGAN-V's
    `subsample_factor` (its fvd2048_128f_subsample8f is 16 frames at stride 8).

    Args:
        frames: T.
        stride: every how many-th frame.
    """

    frames: int = 16
    stride: int = 1

    @property
    def span(self) -> int:
        """Frames a clip must have."""
        return (self.frames - 1) * self.stride + 1

    @property
    def places(self) -> slice:
        """Of the frames in a clip, along its axis of time."""
        return slice(0, self.span, self.stride)

    def describe(self) -> dict[str, int]:
        """For the result file."""
        return {"frames": self.frames, "frame_stride": self.stride}


class TooShort(BadPicture):
    """A clip with fewer frames than are measured."""

    def __init__(self, found: int, cut: ClipCut) -> None:
        super().__init__(f"{found} frames, {cut.span} needed")
        self.found = found


def natural(path: str) -> list[str | tuple[int, str]]:
    """A key that sorts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), part) if index % 2 else part for index, part in enumerate(parts)]


def read_video(path: Path, cut: ClipCut, channels: int, size: int | None) -> Tensor:
    """The frames of a video file: gifs by PIL, others by PyAV (the extra `video`).

    Args:
        path: the file.
        cut: which frames.
        channels: 1 (luma) or 3 (RGB).
        size: edge after resize and crop (as of pictures); None: as they are.

    Returns:
        uint8 (T, C, H, W).

    Raises:
        ConfigError: PyAV is missing.
        TooShort: fewer frames than needed.
        BadPicture: no video, a damaged one, or larger than `MAX_PIXELS` a frame.
    """
    opened = _gif_frames(path) if path.suffix.lower() == ".gif" else _av_frames(path)
    found: list[Tensor] = []
    count = 0
    try:
        with closing(opened):
            for number, picture in enumerate(opened):
                count = number + 1
                if number % cut.stride == 0:
                    found.append(_as_tensor(picture, channels, size))
                if count == cut.span:
                    break
    except (BadPicture, ConfigError):
        raise
    except Exception as error:  # decoders of damaged files raise OSError, EOFError, SyntaxError, FFmpeg's many, …
        raise BadPicture(f"{type(error).__name__}: {first_line(error)}") from error
    if count < cut.span:
        raise TooShort(count, cut)
    return torch.stack(found)


def read_frames(paths: Sequence[Path], cut: ClipCut, channels: int, size: int | None) -> Tensor:
    """The frames of a folder of pictures, in the order given; arguments and result as of `read_video`.

    Raises:
        TooShort: fewer frames than needed.
        BadPicture: a bad frame, or one of another size than the first; it is named.
    """
    if len(paths) < cut.span:
        raise TooShort(len(paths), cut)
    found: list[Tensor] = []
    for path in paths[cut.places]:
        try:
            found.append(decode_picture(path.read_bytes(), channels, size))
        except (BadPicture, OSError) as error:
            raise BadPicture(f"{path.name}: {error}") from error
        if found[-1].shape != found[0].shape:
            raise BadPicture(f"{path.name}: another size than the first frame")
    return torch.stack(found)


def _gif_frames(path: Path) -> Generator[Image.Image, None, None]:
    with Image.open(path, formats=("GIF",)) as film:
        _require_small(film.width, film.height)
        number = 0
        while True:
            try:
                film.seek(number)
            except EOFError:
                return
            yield film
            number += 1


def _av_frames(path: Path) -> Generator[Image.Image, None, None]:
    try:
        import av
    except ImportError:
        raise ConfigError(
            str(path), found="no PyAV to decode it with", expected="the extra video",
            fix="pip install 'acdit[video]', or gifs, folders of frames or an .npz",
        ) from None  # fmt: skip
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    container: Any
    with av.open(f"file:{path.absolute()}", metadata_errors="ignore", options=options) as container:
        if not container.streams.video:
            raise BadPicture("no video in it")
        stream = container.streams.video[0]
        _require_small(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        for frame in container.decode(stream):
            yield frame.to_image()


def _require_small(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadPicture(f"the header declares {width}×{height} pixels a frame, more than {MAX_PIXELS}")


def _as_tensor(picture: Image.Image, channels: int, size: int | None) -> Tensor:
    """(C, H, W)."""
    converted = picture.convert("RGB").convert("L" if channels == 1 else "RGB")
    if size is not None:
        converted = resize_and_crop(converted, size)
    values = torch.from_numpy(np.array(converted))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
