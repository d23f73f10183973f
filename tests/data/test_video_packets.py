"""What the packets of a video tell, and videos whose packets or frames lie."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="PyAV is in the extra video")

import av

from acdit.data import video
from acdit.data.frame_choice import BadClip, FrameChoice, Timeline
from acdit.data.picture import fitted
from acdit.data.video import read_clip
from tests.data.videos import HEIGHT, WIDTH, numbered, numbers, small_video, write_video

GRAY = partial(fitted, channels=1, size=None)
NOISE = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def packet(pts: int | None, dts: int | None = None, **options: Any) -> Any:
    usual = {"size": 9, "is_corrupt": False, "is_keyframe": False, "is_discard": False, "duration": 10}
    return SimpleNamespace(**{**usual, "pts": pts, "dts": dts, **options})


def index_of(packets: list[Any], size: int = 1000, codec: str = "h264") -> Any:
    stream = SimpleNamespace(
        average_rate=Fraction(10), guessed_rate=None, time_base=Fraction(1, 100),
        codec_context=SimpleNamespace(name=codec),
    )  # fmt: skip
    return video._Index.of(SimpleNamespace(demux=lambda _: iter(packets)), stream, size)


# --- the index ---------------------------------------------------------------------------------------------------


def test_times_are_counted_from_the_first_frame_and_sorted() -> None:
    index = index_of([packet(100, 80, is_keyframe=True), packet(130, 90), packet(110, 100), packet(120, 110)])
    assert (index.timeline.ticks.tolist(), index.timeline.end, index.timeline.tick) == (
        [0, 10, 20, 30], 40, Fraction(1, 100),
    )  # fmt: skip
    assert index.numbers == {100: 0, 110: 1, 120: 2, 130: 3}
    assert index.keys == [(100, 80)]  # where to seek is a matter of decoding order


def test_what_is_not_shown_is_not_counted() -> None:
    hidden = packet(90, 90, is_keyframe=True, is_discard=True)
    index = index_of([hidden, packet(100), packet(110), packet(0, size=0)])
    assert index.numbers == {100: 0, 110: 1}
    assert index.keys == [(90, 90)]  # but decoding may begin there
    assert index_of([packet(7)], codec="vp8").numbers == {}  # its packets may hide frames


def test_a_length_that_is_not_told_is_a_frame_at_the_rate() -> None:
    assert index_of([packet(0, duration=0), packet(20, duration=0)]).timeline.end == 30


@pytest.mark.parametrize("odd", [None, 10, 2**62, -(2**62)])
def test_packets_without_usable_times_are_counted(odd: int | None) -> None:
    index = index_of([packet(0), packet(10), packet(odd)])
    assert (index.numbers, index.keys) == ({}, [])
    assert (index.timeline.ticks.tolist(), index.timeline.tick) == ([0, 1, 2], Fraction(1, 10))


def test_impossible_packets_are_refused() -> None:
    with pytest.raises(BadClip, match="more frames than bytes"):
        index_of([packet(10 * number) for number in range(6)], size=5)
    with pytest.raises(BadClip, match="packet 2 is damaged or cut off"):
        index_of([packet(0), packet(10, is_corrupt=True)])
    with pytest.raises(BadClip, match=r"86,401 seconds, more than 86,400"):
        index_of([packet(0), packet(8_640_090)])
    assert index_of([packet(0), packet(8_639_990)]).timeline.end == 8_640_000


@pytest.mark.parametrize(
    ("declared", "named"),
    [
        ({"frames": 1001}, "the header declares 1,001 frames in 1,000 bytes"),
        ({"duration": 8_640_100}, r"the header declares 86,401 seconds, more than 86,400"),
        ({"width": 0}, "no frame size"),
        ({"height": 2**25}, "frames of 64×33554432 pixels"),
    ],
)
def test_a_header_is_judged_by_itself(declared: dict[str, int], named: str) -> None:
    def judge(**changed: int) -> None:
        fields = {"width": 64, "height": 32, "frames": 1000, "duration": 8_640_000, **changed}
        context = SimpleNamespace(width=fields.pop("width"), height=fields.pop("height"))
        video._judge(SimpleNamespace(codec_context=context, time_base=Fraction(1, 100), **fields), 1000, None)

    judge()
    with pytest.raises(BadClip, match=named):
        judge(**declared)


def test_a_file_that_ends_inside_a_packet_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", NOISE.repeat(3, axis=0), codec="mjpeg", pix_fmt="yuvj420p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(BadClip, match=r"packet \d+ is damaged or cut off"):
        read_clip(path, FrameChoice(2, start="first"), GRAY)


def test_ffmpeg_may_open_this_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = small_video(tmp_path / "a.avi"), av.open
    asked: list[tuple[str, dict[str, str]]] = []

    def opened(name: str, **options: Any) -> Any:
        asked.append((name, options["options"]))
        return real(name, **options)

    monkeypatch.setattr(av, "open", opened)
    monkeypatch.chdir(tmp_path)
    read_clip(Path("a.avi"), FrameChoice(4), GRAY)
    assert asked
    for name, options in asked:
        assert name == f"file:{path}"
        assert options["protocol_whitelist"] == "file"
        assert "hls" not in options["format_whitelist"].split(",")
        assert "avi" in options["format_whitelist"].split(",")


def test_a_title_in_an_unknown_encoding_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title"
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for array in numbered(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="gray")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"a title") == 1
    path.write_bytes(data.replace(b"a title", b"\xff\xfe\x80\xe9tle"))
    assert numbers(read_clip(path, FrameChoice(4), GRAY)) == [0, 1, 2, 3]


# --- decoding ----------------------------------------------------------------------------------------------------


def decoding(packets: list[Any], frame: Any, since: int | None) -> tuple[list[Any], list[Any]]:
    given: list[Any] = []

    def decode(one: Any) -> list[Any]:
        given.append(None if one is None else one.pts)
        return [frame] if one is not None else []

    context = SimpleNamespace(decode=decode)
    frames = video._frames(
        SimpleNamespace(demux=lambda _: iter(packets)), SimpleNamespace(codec_context=context), since
    )
    return given, list(frames)


def test_what_is_shown_before_the_sought_keyframe_is_not_decoded() -> None:
    packets = [packet(50), packet(30), packet(None), packet(0, size=0), packet(60)]
    whole = SimpleNamespace(is_corrupt=False)
    assert decoding(packets, whole, 50)[0] == [50, None, 60, None]
    assert decoding(packets, whole, None)[0] == [50, 30, None, 60, None]  # the last one empties the decoder


def test_a_frame_that_is_marked_as_damaged_is_refused() -> None:
    with pytest.raises(BadClip, match="a damaged frame"):
        decoding([packet(0)], SimpleNamespace(is_corrupt=True), None)


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_a_video_with_fewer_frames_than_packets_is_as_long_as_its_frames(
    tmp_path: Path, draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = small_video(tmp_path / "a.avi"), video._Index.of

    def counted(*arguments: Any) -> Any:
        index = real(*arguments)
        return video._Index(Timeline.steady(19, index.rate), index.rate, {}, [])

    monkeypatch.setattr(video._Index, "of", counted)
    first = int(draw * (19 - 4 + 1))
    first = first if first + 4 <= 12 else int(draw * (12 - 4 + 1))
    assert numbers(read_clip(path, FrameChoice(4), GRAY, draw=draw)) == list(range(first, first + 4))
    with pytest.raises(BadClip, match="12 frames, 13 needed"):
        read_clip(path, FrameChoice(13), GRAY)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_video(tmp_path / "a.avi")
    monkeypatch.setattr(video, "_by_count", lambda *_: ({0: torch.zeros(1, 2, 2)}, 9))
    with pytest.raises(BadClip, match="frames that come and go"):
        read_clip(path, FrameChoice(4), GRAY)


def test_frames_of_several_sizes_are_refused_unless_they_are_resized(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(4):
            file = io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT * (1 + number // 2))).save(file, "JPEG")
            made = av.Packet(file.getvalue())
            made.stream, made.pts, made.dts, made.time_base = stream, number, number, Fraction(1, 25)
            container.mux(made)
    with pytest.raises(BadClip, match="frames of several sizes"):
        read_clip(path, FrameChoice(4), GRAY)
    assert read_clip(path, FrameChoice(4), partial(fitted, channels=1, size=(8, 8))).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_film_turned_by_any_quarter_is_shown_upright(tmp_path: Path, matrix: tuple[int, ...], turns: int) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(4))
    upright = read_clip(path, FrameChoice(4), GRAY)
    data = bytearray(path.read_bytes())
    a, b, c, d = (65536 * value for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)
    assert torch.equal(read_clip(path, FrameChoice(4), GRAY), upright.rot90(turns, (2, 3)))


# --- damage ------------------------------------------------------------------------------------------------------


def one_byte_wrong(path: Path, copies: int) -> Iterator[bytes]:
    """Copies of a film with one byte inside its packets changed, behind what a JPEG's header takes."""
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    with av.open(str(path)) as container:
        packets = [bytes(one) for one in container.demux(video=0) if one.size]
    places = [
        whole.index(content) + place
        for content in packets
        for place in range(max(14, content.find(b"\xff\xda") + 14), len(content) - 2)
    ]
    for _ in range(copies):
        data = bytearray(whole)
        data[rng.choice(places)] ^= rng.integers(1, 256)
        yield bytes(data)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("mjpeg", "yuvj420p"), ("mpeg4", "yuv420p")])
def test_most_single_wrong_bytes_are_seen(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    """Of Motion JPEG FFmpeg must be told to stop at errors; of MPEG-4 it marks frames that it painted over."""
    path = write_video(tmp_path / "a.mkv", NOISE, codec=codec, pix_fmt=pix_fmt)
    seen = 0
    for number, data in enumerate(one_byte_wrong(path, 40)):
        damaged = tmp_path / f"{number}.mkv"
        damaged.write_bytes(data)
        try:
            read_clip(damaged, FrameChoice(4), GRAY)
        except BadClip:
            seen += 1
    assert seen >= 20
