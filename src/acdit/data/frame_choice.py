"""Which frames of a video make a clip: arithmetic on frame numbers and times, without a file."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from acdit.data.picture import BadPicture
from acdit.errors import ConfigError

STARTS = ("random", "center", "first")
SHORT_CLIPS = ("error", "loop")


class BadClip(BadPicture):
    """This clip cannot be used; the message says why."""


class TooShort(BadClip):
    """Fewer frames than a clip has; `found` says how many."""

    def __init__(self, found: int, needed: int, fps: float | None = None) -> None:
        super().__init__(f"{found} frames{'' if fps is None else f' at {fps:g} a second'}, {needed} needed")
        self.found = found


@dataclass(frozen=True)
class Timeline:
    """When the displayed frames of a video begin.

    Args:
        ticks: (N,) ascending, the first 0.
        end: when the last frame ends, in ticks.
        tick: seconds.
    """

    ticks: np.ndarray
    end: int
    tick: Fraction

    @classmethod
    def steady(cls, frames: int, rate: Fraction) -> Timeline:
        """Frames of equal length, `rate` a second."""
        return cls(np.arange(frames), frames, 1 / rate)

    def __len__(self) -> int:
        return len(self.ticks)

    def nearest(self, seconds: Fraction) -> int:
        """The frame that begins nearest to a time; of two equally near the earlier.

        Nearest, not the one on screen: containers round times (to a millisecond, for instance), and a frame that
        begins a rounding later than it should must not be passed over.
        """
        place = seconds / self.tick
        after = int(np.searchsorted(self.ticks, int(place), side="right"))
        if after == len(self.ticks):
            return after - 1
        return after if int(self.ticks[after]) - place < place - int(self.ticks[after - 1]) else after - 1


@dataclass(frozen=True)
class FrameChoice:
    """How a clip is cut out of a video.

    Args:
        frames: T.
        stride: every how many-th frame.
        fps: count frames of so many a second, by the video's times; None: the frames as they are.
        start: "random" (where a draw says), "center" or "first".
        short: what becomes of a video with too few frames: "error", or "loop": from its first frame, over and over.

    Raises:
        ConfigError: fewer than one frame, a stride below 1, a rate below 0.001 or above 1000, an unknown name.
    """

    frames: int = 16
    stride: int = 1
    fps: float | None = None
    start: str = "random"
    short: str = "error"

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("frame_stride", self.stride)):
            if value < 1:
                raise ConfigError(f"data.{name}", found=str(value), expected="at least 1")
        if self.fps is not None and not 1e-3 <= self.fps <= 1000:  # NaN neither
            raise ConfigError("data.fps", found=str(self.fps), expected="0.001 … 1000")
        for name, chosen, known in (("start", self.start, STARTS), ("short_clips", self.short, SHORT_CLIPS)):
            if chosen not in known:
                raise ConfigError(f"data.{name}", found=repr(chosen), expected=f"one of {known}")

    @property
    def span(self) -> int:
        """Frames from the first to the last of a clip, as they are counted."""
        return (self.frames - 1) * self.stride + 1

    def of(self, timeline: Timeline, draw: float | None = None) -> list[int]:
        """Numbers of the T frames of a video.

        Args:
            timeline: of the video.
            draw: uniform in [0, 1), of start="random"; None: from the centre.

        Raises:
            TooShort: too few frames.
        """
        rate = None if self.fps is None else Fraction(self.fps).limit_denominator(100_000)
        count = len(timeline)
        if rate is not None and count:
            count = max(1, round(timeline.end * timeline.tick * rate))
        if count == 0 or (count < self.span and self.short == "error"):
            raise TooShort(count, self.span, self.fps)
        room = max(0, count - self.span)
        if self.start == "random" and draw is not None:
            first = int(draw * (room + 1))
        else:
            first = 0 if self.start == "first" else room // 2
        places = [(first + step * self.stride) % count for step in range(self.frames)]
        return places if rate is None else [timeline.nearest(place / rate) for place in places]
