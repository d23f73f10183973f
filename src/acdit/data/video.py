"""One video file → the frames of one clip, without trusting the file.

The header is judged before a frame is decoded: container, size, length, number of frames. Packets are then listed
without decoding them, which tells how many frames there are and when; and only what the wanted frames need is decoded,
from the keyframe before the first of them. Everything wrong with a file is a `BadClip`.
"""

from __future__ import annotations

import contextlib
import itertools
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acdit.data.frame_choice import BadClip, FrameChoice, Timeline
from acdit.data.mp4_header import require_credible_counts
from acdit.data.picture import BadPicture, require_no_strip
from acdit.errors import ConfigError, first_line

SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".gif")
MAX_FRAME_PIXELS = 2**25
"""A header that declares larger frames is refused (8K fits): a decoder may hold 16 of them."""
MAX_SECONDS = 86_400
"""A header that declares more than a day is refused."""

# A closed list: FFmpeg also knows formats that open other files and addresses (playlists, concatenations).
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,gif"
# Codecs whose every packet is one displayed frame: only there does a packet's time tell a frame's number. Others hide
# frames (VP8) or pack two frames into a packet (XviD): they are decoded from the start and counted.
_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9", "mjpeg", "ffv1", "png", "rawvideo", "huffyuv", "prores")
# Decoders that find more damage when told to stop at the first error, as measured (docs/reliability.md).
_STOPS_AT_ERRORS = ("mjpeg", "hevc")
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}  # fmt: skip

Fit = Callable[[Image.Image], Tensor]


def require_av() -> None:
    """Refuse to go on without PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "data.kind=clips", found=f"no library `av` ({first_line(error)})", expected="the extra `video`",
            fix="pip install 'acdit[video]'",
        ) from None  # fmt: skip


def header_size(path: Path) -> tuple[int, int]:
    """(H, W) that a video's header declares; no frame is decoded.

    Raises:
        BadClip: not a video, or one that is refused on its header.
    """
    with _opened(path, None) as (_, stream):
        return stream.codec_context.height, stream.codec_context.width


def read_clip(
    path: Path, choice: FrameChoice, fit: Fit, size: tuple[int, int] | None = None, draw: float | None = None
) -> Tensor:
    """The frames of one clip.

    Args:
        path: the file.
        choice: which frames.
        fit: upright frame → uint8 (C, H, W).
        size: (H, W) that frames will be scaled to, as far as it is known.
        draw: where a clip with a random start begins (see `FrameChoice.of`).

    Returns:
        uint8 (C, T, H, W). Frame i of a video is the i-th that is displayed.

    Raises:
        BadClip: not a video, damaged where it was decoded (as far as FFmpeg tells), too short, or refused on
            its header.
    """
    with _opened(path, size) as (container, stream):
        index = _Index.of(container, stream, path.stat().st_size)
    wanted = choice.of(index.timeline, draw)
    found: dict[int, Tensor] = {}
    if index.numbers:
        found = _by_time(path, index, set(wanted), fit, size)
    if len(found) < len(set(wanted)):
        found, count = _by_count(path, set(wanted), fit, size)
        if len(found) < len(set(wanted)):  # the video has fewer frames than packets: now it is known how many
            wanted = choice.of(Timeline.steady(count, index.rate), draw)
            found, _ = _by_count(path, set(wanted), fit, size)
    if not found.keys() >= set(wanted):
        raise BadClip("frames that come and go: decoded twice, it had fewer the second time")
    frames = [found[number] for number in wanted]
    if any(frame.shape != frames[0].shape for frame in frames):
        raise BadClip("frames of several sizes")
    return torch.stack(frames, dim=1)


@dataclass(frozen=True)
class _Index:
    """What the packets of a video tell."""

    timeline: Timeline
    rate: Fraction
    """Frames a second, on average."""
    numbers: dict[int, int]
    """Time stamp → frame number; empty where packets do not tell."""
    keys: list[tuple[int, int]]
    """(time stamp, where to seek) of every keyframe, as they lie in the file."""

    @classmethod
    def of(cls, container: Any, stream: Any, size: int) -> _Index:
        """List all packets of a file of `size` bytes, decoding none."""
        shown, packets = array("q"), 0
        keys: list[tuple[int, int]] = []
        timed, length = True, 0
        for packet in container.demux(stream):
            if not packet.size:  # the end, or a place without a frame
                continue
            packets += 1
            if packet.is_corrupt:
                raise BadClip(f"packet {packets} is damaged or cut off")
            if packets > size:
                raise BadClip("more frames than bytes")
            time = packet.pts
            if time is None or not -(2**62) < time < 2**62:
                timed = False
            else:
                if packet.is_keyframe:
                    keys.append((time, time if packet.dts is None else packet.dts))
                if not packet.is_discard:  # decoded for others' sake, and not displayed
                    shown.append(time)
                    length = packet.duration or length
        times = np.sort(np.array(shown, dtype=np.int64))
        rate = _fraction(stream.average_rate) or _fraction(stream.guessed_rate) or Fraction(25)
        if not timed or (len(times) and not np.diff(times).all()):
            return cls(Timeline.steady(packets, rate), rate, {}, [])
        tick = _fraction(stream.time_base)
        last = int(times[-1] - times[0]) if len(times) else 0
        end = last + (length or max(1, round(1 / rate / tick)))
        if end * tick > MAX_SECONDS:
            raise BadClip(f"{float(end * tick):,.0f} seconds, more than {MAX_SECONDS:,}")
        tells = stream.codec_context.name in _FRAME_A_PACKET
        numbers = {int(time): number for number, time in enumerate(times)} if tells else {}
        return cls(Timeline(times - times[:1], end, tick), rate, numbers, keys)


def _by_time(path: Path, index: _Index, wanted: set[int], fit: Fit, size: tuple[int, int] | None) -> dict[int, Tensor]:
    """Frames by number, found by their time stamps; perhaps not all."""
    first = min(time for time, number in index.numbers.items() if number in wanted)
    # The last keyframe in the file whose own time is not later: what follows it in time follows from it.
    keys = [key for key in index.keys if key[0] <= first]
    since = None
    found: dict[int, Tensor] = {}
    with _opened(path, size) as (container, stream):
        if len(keys) > 1:
            since, place = keys[-1]
            container.seek(place, stream=stream, backward=True)
        for frame in _frames(container, stream, since):
            number = index.numbers.get(frame.pts, -1) if frame.pts is not None else -1
            if number in wanted and number not in found:
                found[number] = _fitted(frame, fit)
                if len(found) == len(wanted):
                    break
    return found


def _by_count(path: Path, wanted: set[int], fit: Fit, size: tuple[int, int] | None) -> tuple[dict[int, Tensor], int]:
    """Frames by number, counted from the start, and how many were counted before all were found."""
    found: dict[int, Tensor] = {}
    count = 0
    with _opened(path, size) as (container, stream):
        for number, frame in enumerate(_frames(container, stream)):
            count = number + 1
            if number in wanted:
                found[number] = _fitted(frame, fit)
                if len(found) == len(wanted):
                    break
    return found, count


def _frames(container: Any, stream: Any, since: int | None = None) -> Iterator[Any]:
    """Decoded frames in display order, once a keyframe of time `since` was sought without those that are displayed
    before it: they may need what lies before it in the file."""
    packets = (packet for packet in container.demux(stream) if packet.size)  # an empty one would mean: all is over
    wanted = (packet for packet in packets if since is None or packet.pts is None or packet.pts >= since)
    for packet in itertools.chain(wanted, [None]):
        for frame in stream.codec_context.decode(packet):
            if frame.is_corrupt:  # FFmpeg painted over the damage, here and in the frames that follow from this one
                raise BadClip("a damaged frame")
            yield frame


def _fitted(frame: Any, fit: Fit) -> Tensor:
    import av

    alone = {"threads": 1} if _major(av) >= 17 else {}  # before, there were no threads here
    picture = Image.fromarray(frame.reformat(format="rgb24", **alone).to_ndarray())
    turned = _UPRIGHT.get(frame.rotation)
    return fit(picture if turned is None else picture.transpose(turned))


@contextlib.contextmanager
def _opened(path: Path, size: tuple[int, int] | None) -> Iterator[tuple[Any, Any]]:
    """Container and video stream, once the header was judged; whatever goes wrong inside is a `BadClip`."""
    import av

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
            raise BadClip("not a regular file")
        require_credible_counts(path)
        lenient: dict[str, Any] = {"metadata_errors": "ignore"} if _major(av) < 19 else {}  # titles in any encoding
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        with av.open(f"file:{path.absolute()}", options=options, **lenient) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadClip("no video in it")
            _judge(stream, path.stat().st_size, size)
            # Loaders have their own processes: a decoder with threads for every core in each would only fight.
            stream.codec_context.thread_count = 1
            strict = {"err_detect": "explode"} if stream.codec_context.name in _STOPS_AT_ERRORS else {}
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS), **strict}
            yield container, stream
    except BadClip:
        raise
    except BadPicture as error:
        raise BadClip(str(error)) from None
    except Exception as error:  # FFmpeg's many, OSError, MemoryError, UnicodeError of a strange file name
        raise BadClip(f"{type(error).__name__}: {first_line(error)}") from error


def _major(av: Any) -> int:
    return int(av.__version__.partition(".")[0])


def _fraction(ratio: Any) -> Fraction:
    """PyAV's ratios, a `Fraction` or a type of its own; 0 where nothing is known."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(0)


def _judge(stream: Any, file_size: int, size: tuple[int, int] | None) -> None:
    """Refuse what the header alone condemns."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width or not height:
        raise BadClip("the header declares no frame size, or one that FFmpeg refuses")
    if width * height > MAX_FRAME_PIXELS:
        raise BadClip(f"the header declares frames of {width}×{height} pixels, more than {MAX_FRAME_PIXELS:,}")
    if size is not None:
        require_no_strip(width, height, size)
    if stream.frames > file_size:
        raise BadClip(f"the header declares {stream.frames:,} frames in {file_size:,} bytes")
    seconds = float((stream.duration or 0) * _fraction(stream.time_base))
    if seconds > MAX_SECONDS:
        raise BadClip(f"the header declares {seconds:,.0f} seconds, more than {MAX_SECONDS:,}")
