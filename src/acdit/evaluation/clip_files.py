"""One clip in a file or a folder of frames → its first frames, without trusting the file."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from acdit.data.frame_choice import FrameChoice, TooShort
from acdit.data.picture import MAX_PIXELS, BadPicture, decode_picture, fitted, height_width
from acdit.data.video import read_clip
from acdit.errors import ConfigError, first_line


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


def natural(path: str) -> list[str | tuple[int, str]]:
    """A key that sorts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), part) if index % 2 else part for index, part in enumerate(parts)]


def read_video(path: Path, cut: ClipCut, channels: int, size: int | None) -> Tensor:
    """The frames of a video file: gifs by PIL, so that they need no extra, others as training reads them (`read_clip`).

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
        BadPicture: no video, a damaged one, or one that is refused on its header.
    """
    edges = height_width(size)
    fit = partial(fitted, channels=channels, size=edges)
    if path.suffix.lower() != ".gif":
        _require_av(path)
        return read_clip(path, FrameChoice(cut.frames, cut.stride, start="first"), fit, edges).transpose(0, 1)
    found: list[Tensor] = []
    count = 0
    try:
        with closing(_gif_frames(path)) as pictures:
            for number, picture in enumerate(pictures):
                count = number + 1
                if number % cut.stride == 0:
                    found.append(fit(picture.convert("RGB")))
                if count == cut.span:
                    break
    except BadPicture:
        raise
    except Exception as error:  # PIL raises OSError, EOFError, SyntaxError, … on damaged files
        raise BadPicture(f"{type(error).__name__}: {first_line(error)}") from error
    if count < cut.span:
        raise TooShort(count, cut.span)
    return torch.stack(found)


def read_frames(paths: Sequence[Path], cut: ClipCut, channels: int, size: int | None) -> Tensor:
    """The frames of a folder of pictures, in the order given; arguments and result as of `read_video`.

    Raises:
        TooShort: fewer frames than needed.
        BadPicture: a bad frame, or one of another size than the first; it is named.
    """
    if len(paths) < cut.span:
        raise TooShort(len(paths), cut.span)
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
        if film.width * film.height > MAX_PIXELS:
            raise BadPicture(f"the header declares {film.width}×{film.height} pixels a frame, more than {MAX_PIXELS}")
        number = 0
        while True:
            try:
                film.seek(number)
            except EOFError:
                return
            yield film
            number += 1


def _require_av(path: Path) -> None:
    try:
        import av  # noqa: F401
    except ImportError:
        raise ConfigError(
            str(path), found="no PyAV to decode it with", expected="the extra video",
            fix="pip install 'acdit[video]', or gifs, folders of frames or an .npz",
        ) from None  # fmt: skip
