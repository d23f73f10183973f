"""Which frames make a clip."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from acdit.data.frame_choice import BadClip, FrameChoice, Timeline, TooShort
from acdit.errors import ConfigError

THIRTY = Timeline.steady(60, Fraction(30))


@pytest.mark.parametrize(
    ("start", "draw", "first"),
    [("first", None, 0), ("center", None, 25), ("random", None, 25), ("random", 0.0, 0), ("random", 0.9999, 50)],
)
def test_a_clip_begins_where_it_should(start: str, draw: float | None, first: int) -> None:
    assert FrameChoice(4, 3, start=start).of(THIRTY, draw) == [first + 3 * step for step in range(4)]


def test_every_place_is_as_likely_as_any_other() -> None:
    starts = [FrameChoice(57).of(THIRTY, draw)[0] for draw in np.linspace(0, 1, 4000, endpoint=False)]
    assert np.bincount(starts).tolist() == [1000] * 4


def test_a_rate_is_kept_by_time() -> None:
    first = {"start": "first"}
    assert FrameChoice(5, fps=10, **first).of(THIRTY) == [0, 3, 6, 9, 12]
    assert FrameChoice(3, 2, fps=10, **first).of(THIRTY) == [0, 6, 12]
    assert FrameChoice(5, fps=60, **first).of(THIRTY) == [0, 0, 1, 1, 2]
    assert FrameChoice(60, fps=30, **first).of(THIRTY) == list(range(60))
    assert FrameChoice(6, fps=29.97, **first).of(THIRTY) == list(range(6))


def test_the_middle_of_an_odd_room_is_the_earlier_place() -> None:
    assert FrameChoice(4, start="center").of(Timeline.steady(5, Fraction(25))) == [0, 1, 2, 3]


def test_a_rate_counts_whole_frames_to_the_nearest_and_at_least_one() -> None:
    assert len(FrameChoice(20, fps=10).of(Timeline.steady(59, Fraction(30)))) == 20  # 19.7
    with pytest.raises(TooShort, match=r"^19 frames at 10 a second, 20 needed") as caught:
        FrameChoice(20, fps=10).of(Timeline.steady(58, Fraction(30)))  # 19.3
    assert caught.value.found == 19
    assert FrameChoice(1, fps=1).of(Timeline.steady(1, Fraction(25))) == [0]


def test_an_odd_rate_does_not_drift() -> None:
    long = Timeline.steady(2000, Fraction(30))
    assert FrameChoice(2, 1000, fps=23.976, start="first").of(long) == [0, 1251]  # 1250 at 24 a second


def test_times_that_a_container_rounded_pass_over_no_frame() -> None:
    milliseconds = Timeline(np.round(np.arange(60) * 1000 / 30).astype(np.int64), 2000, Fraction(1, 1000))
    assert FrameChoice(60, fps=30, start="first").of(milliseconds) == list(range(60))


def test_frames_of_different_length() -> None:
    film = Timeline(np.array([0, 10, 11, 12, 50]), 60, Fraction(1, 10))
    assert FrameChoice(6, fps=1, start="first").of(film) == [0, 1, 3, 3, 4, 4]
    with pytest.raises(BadClip, match="6 frames at 1 a second, 7 needed"):
        FrameChoice(7, fps=1).of(film)


def test_too_few_frames_are_an_error_or_a_loop() -> None:
    few = Timeline.steady(5, Fraction(25))
    with pytest.raises(BadClip, match=r"^5 frames, 7 needed"):
        FrameChoice(4, 2).of(few)
    assert FrameChoice(4, 2, short="loop").of(few, 0.9) == [0, 2, 4, 1]
    assert FrameChoice(4, 2, short="loop").of(few) == [0, 2, 4, 1]
    assert FrameChoice(3, short="loop").of(Timeline.steady(1, Fraction(25))) == [0, 0, 0]
    assert FrameChoice(3, short="loop", start="first").of(few) == [0, 1, 2]
    with pytest.raises(BadClip, match="0 frames"):
        FrameChoice(4, short="loop").of(Timeline.steady(0, Fraction(25)))


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": 0},
        {"stride": 0},
        {"fps": 0.0},
        {"fps": 1e-6},
        {"fps": math.nan},
        {"fps": math.inf},
        {"start": "end"},
        {"short": "repeat"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\."):
        FrameChoice(**settings)
