"""Clips as files: mp4, gif or a folder of frames, written as frames come, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acdit.errors import ConfigError
from acdit.pictures import as_bytes, image_grid

FORMATS = ("mp4", "gif", "frames")
_SMALL = 128  # shorter edges are enlarged to at least this in films, by whole pixels: a 16-pixel film shows nothing


class ClipWriter(Protocol):
    """Takes frames (T, C, H, W), uint8 or float in [0, 1], and writes them; used as a context."""

    path: Path

    def __enter__(self) -> ClipWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, frames: Tensor) -> None:
        """Append frames."""
        ...


def open_writer(path: str | Path, kind: str | None = None, fps: float = 8.0, comment: str | None = None) -> ClipWriter:
    """A writer for a clip.

    Args:
        path: of the file, or of the folder of frames.
        kind: "mp4" (needs the extra `video`), "gif" or "frames"; None: what the path ends in, without a suffix frames.
        fps: frames a second.
        comment: kept inside mp4 and gif.

    Raises:
        ConfigError: an unknown kind, or mp4 without PyAV.
    """
    if kind is None:
        kind = Path(path).suffix.removeprefix(".").lower() or "frames"
    if kind not in FORMATS:
        raise ConfigError("--format", found=repr(kind), expected=f"one of {FORMATS}")
    if kind == "mp4":
        return _Mp4(Path(path), fps, comment)
    return _Gif(Path(path), fps, comment) if kind == "gif" else _Frames(Path(path))


def write_clip(
    frames: Tensor, path: str | Path, kind: str | None = None, fps: float = 8.0, comment: str | None = None
) -> None:
    """A whole clip (T, C, H, W), uint8 or float in [0, 1], to a file or folder; see `open_writer`."""
    with open_writer(path, kind, fps, comment) as writer:
        writer.add(frames)


def contact_sheet(clips: Tensor, columns: int = 8, row_labels: Sequence[str] | None = None) -> Image.Image:
    """Clips (M, T, C, H, W), uint8 or float in [0, 1], a clip a row, with `columns` frames spread over its time."""
    shown = torch.linspace(0, clips.shape[1] - 1, min(columns, clips.shape[1])).round().long()
    names = [f"t={int(index)}" for index in shown]
    return image_grid(clips[:, shown].flatten(0, 1), len(shown), row_labels=row_labels, column_labels=names)


def _enlarged(frame: Tensor) -> np.ndarray:
    """(C, H, W) uint8 → (H, W, 3), small ones enlarged, each pixel a square."""
    array = frame.permute(1, 2, 0).cpu().numpy()
    array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
    factor = max(1, -(-_SMALL // min(array.shape[:2])))
    return np.ascontiguousarray(array.repeat(factor, axis=0).repeat(factor, axis=1))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        pass


class _Mp4(_Writer):
    """H.264 in fragments of a second: what is written so far can be watched while the rest is made, or after a kill."""

    def __init__(self, path: Path, fps: float, comment: str | None) -> None:
        super().__init__(path)
        self._comment = comment
        try:
            import av
        except ImportError:
            raise ConfigError(
                "--format mp4", found="no PyAV", expected="the extra video", fix="pip install 'acdit[video]', or gif"
            ) from None
        self._av, self._fps = av, Fraction(fps).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None

    def add(self, frames: Tensor) -> None:
        for frame in as_bytes(frames):
            array = _enlarged(frame)
            # H.264 halves the colours' resolution: edges must be even.
            array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")
            if self._container is None:
                self._open(*array.shape[:2])
            self._mux(self._stream.encode(self._av.VideoFrame.from_ndarray(array, format="rgb24")))

    def _open(self, height: int, width: int) -> None:
        # An explicit format: a file that is not finished may have any name.
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = self._av.open(str(self.path), "w", format="mp4", options=options)
        if self._comment is not None:
            self._container.metadata["comment"] = self._comment
        self._stream = self._container.add_stream("libx264", rate=self._fps)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.options = {"crf": "12", "g": str(max(1, round(self._fps)))}

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._container.mux(packet)

    def _close(self) -> None:
        if self._container is not None:
            self._mux(self._stream.encode())
            self._container.close()


class _Gif(_Writer):
    """All frames are kept until the end: a gif of a long stream takes memory, an mp4 does not."""

    def __init__(self, path: Path, fps: float, comment: str | None) -> None:
        super().__init__(path)
        self._comment = comment
        self._pages: list[Image.Image] = []
        self._milliseconds = round(1000 / fps)

    def add(self, frames: Tensor) -> None:
        self._pages += [Image.fromarray(_enlarged(frame)) for frame in as_bytes(frames)]

    def _close(self) -> None:
        if self._pages:
            self._pages[0].save(
                self.path,
                format="GIF",
                save_all=True,
                append_images=self._pages[1:],
                duration=self._milliseconds,
                loop=0,
                **({} if self._comment is None else {"comment": self._comment.encode()}),
            )


class _Frames(_Writer):
    """00000.png, 00001.png, … as they are, not enlarged; goes on behind what is there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._count = 0

    def __enter__(self) -> Any:
        self.path.mkdir(parents=True, exist_ok=True)
        self._count = len(list(self.path.glob("[0-9]*.png")))
        return self

    def add(self, frames: Tensor) -> None:
        for frame in as_bytes(frames):
            array = np.ascontiguousarray(frame.permute(1, 2, 0).squeeze(2).cpu().numpy())
            Image.fromarray(array).save(self.path / f"{self._count:05d}.png")
            self._count += 1
