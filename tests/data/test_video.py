"""Decoding one video: exact frames in any container, and files that lie (rows 22 and 23 of the reliability bar)."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is in the extra video")

from acdit.data import video
from acdit.data.frame_choice import BadClip, FrameChoice
from acdit.data.mp4_header import require_credible_counts
from acdit.data.picture import fitted
from acdit.data.video import header_size, read_clip
from tests.data.videos import HEIGHT, WIDTH, numbered, numbers, write_video

GRAY = partial(fitted, channels=1, size=None)
COUNT = 60
X264 = {"crf": "18", "g": "12", "bf": "3", "sc_threshold": "0"}
KINDS: dict[str, dict[str, Any]] = {
    "h264 with B-frames.mp4": {"codec": "libx264", "options": X264},
    "h264 open GOP.mkv": {"codec": "libx264", "options": {**X264, "x264-params": "open-gop=1:keyint=12:bframes=3"}},
    "h264.mov": {"codec": "libx264", "options": {**X264, "bf": "0"}},
    "mpeg4 with B-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "vp8 with hidden frames.webm": {
        "codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "b": "2M"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "b": "2M", "cpu-used": "8"}},
    "film.gif": {"codec": "gif", "pix_fmt": "gray"},
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, numbered(COUNT), **options) for name, options in KINDS.items()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each decoding took."""
    counts: list[int] = []
    frames = video._frames

    def counting(*arguments: Any) -> Iterator[Any]:
        counts.append(0)
        for frame in frames(*arguments):
            counts[-1] += 1
            yield frame

    monkeypatch.setattr(video, "_frames", counting)
    return counts


# --- exactly the frames that are asked for -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_frame_i_is_the_ith_that_is_displayed(videos: dict[str, Path], name: str) -> None:
    whole = read_clip(videos[name], FrameChoice(COUNT), GRAY)
    assert (tuple(whole.shape), whole.dtype) == ((1, COUNT, HEIGHT, WIDTH), torch.uint8)
    assert numbers(whole) == list(range(COUNT))
    choice = FrameChoice(4, 3)
    for first in range(COUNT - choice.span + 1):
        clip = read_clip(videos[name], choice, GRAY, draw=(first + 0.5) / (COUNT - choice.span + 1))
        assert torch.equal(clip, whole[:, first : first + 10 : 3])  # to the bit, wherever decoding began


@pytest.mark.parametrize("name", ["h264 with B-frames.mp4", "h264 open GOP.mkv", "vp9.webm"])
def test_a_late_start_decodes_from_the_keyframe_before_it_and_stops_behind_the_last(
    videos: dict[str, Path], name: str, decoded: list[int]
) -> None:
    read_clip(videos[name], FrameChoice(4), GRAY, draw=0.9)
    read_clip(videos[name], FrameChoice(4, start="first"), GRAY)
    assert len(decoded) == 2
    assert decoded[0] <= 12 + 4 + 3
    assert decoded[1] <= 4 + 3


def test_frames_are_counted_where_packets_do_not_tell(videos: dict[str, Path], decoded: list[int]) -> None:
    read_clip(videos["mpeg4 with B-frames.avi"], FrameChoice(4), GRAY, draw=0.5)
    assert decoded == [int(0.5 * 57) + 4]


def test_a_rate_follows_the_times_in_the_file(tmp_path: Path) -> None:
    steady = write_video(tmp_path / "a.mkv", numbered(60), codec="ffv1", pix_fmt="gray", rate=30)
    assert numbers(read_clip(steady, FrameChoice(5, fps=10, start="first"), GRAY)) == [0, 3, 6, 9, 12]
    assert numbers(read_clip(steady, FrameChoice(60, fps=30), GRAY)) == list(range(60))  # times are in milliseconds
    uneven = write_video(tmp_path / "b.mp4", numbered(5), rate=10, times=[0, 10, 11, 12, 50])
    found = numbers(read_clip(uneven, FrameChoice(5, fps=1, start="first"), GRAY))
    assert found == [0, 1, 3, 3, 4]


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path: Path) -> None:
    """A cut without re-encoding: the file begins at a keyframe, what is shown begins five frames later."""
    path = write_video(tmp_path / "a.mp4", numbered(30), options={**X264, "bf": "0"})
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 8
    assert struct.unpack_from(">I", data, at) == (1,)
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    struct.pack_into(">i", data, at + 8, struct.unpack_from(">i", data, at + 8)[0] + 5 * timescale // 25)
    path.write_bytes(data)
    assert numbers(read_clip(path, FrameChoice(4, start="first"), GRAY)) == [5, 6, 7, 8]


def test_a_turned_film_is_shown_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(4))
    upright = read_clip(path, FrameChoice(4), GRAY)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">3i", data, matrix) == (65536, 0, 0)
    struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, HEIGHT * 65536, 0, 2**30)  # 90° clockwise
    path.write_bytes(data)
    turned = read_clip(path, FrameChoice(4), GRAY)
    assert torch.equal(turned, upright.rot90(-1, (2, 3)))
    assert header_size(path) == (HEIGHT, WIDTH)


def test_decoding_takes_no_threads_of_its_own(videos: dict[str, Path]) -> None:
    seen = []

    def fit(picture: Any) -> torch.Tensor:
        seen.append(len(os.listdir(f"/proc/{os.getpid()}/task")))
        return GRAY(picture)

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    before = len(os.listdir("/proc/self/task"))
    for name in ("h264 with B-frames.mp4", "vp9.webm", "ffv1.mkv"):
        read_clip(videos[name], FrameChoice(40), fit)
    assert max(seen) <= before
    assert threading.active_count() >= 1


# --- row 22: corrupt files ---------------------------------------------------------------------------------------


def damaged(path: Path, start: float, stop: float) -> Path:
    """A copy with every byte between two places inverted."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[int(start * len(data)) : int(stop * len(data))] ^= 0xFF
    copy = path.with_name(f"damaged {path.name}")
    copy.write_bytes(data.tobytes())
    return copy


@pytest.mark.parametrize("content", [b"", b"this is no video", b"\0" * 1000])
def test_what_is_no_video_is_a_bad_clip(tmp_path: Path, content: bytes) -> None:
    for suffix in video.SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with pytest.raises(BadClip):
            read_clip(path, FrameChoice(4), GRAY)


@pytest.mark.parametrize("name", ["h264 with B-frames.mp4", "ffv1.mkv", "mpeg4 with B-frames.avi"])
def test_a_cut_or_scrambled_file_is_a_bad_clip(videos: dict[str, Path], name: str) -> None:
    with pytest.raises(BadClip):
        read_clip(damaged(videos[name], 0.2, 0.8), FrameChoice(COUNT), GRAY)
    cut = videos[name].with_name(f"cut {name}")
    cut.write_bytes(videos[name].read_bytes()[: videos[name].stat().st_size // 2])
    with pytest.raises(BadClip):
        read_clip(cut, FrameChoice(COUNT), GRAY)


def test_sound_alone_is_a_bad_clip(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadClip, match="no video in it"):
        read_clip(tmp_path / "a.mp4", FrameChoice(1), GRAY)


@pytest.mark.parametrize("name", ["h264 with B-frames.mp4", "vp8 with hidden frames.webm", "mjpeg.avi", "film.gif"])
def test_random_damage_gives_a_clip_or_a_bad_clip_and_nothing_else(videos: dict[str, Path], name: str) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(videos[name].read_bytes(), np.uint8)
    path = videos[name].with_name(f"fuzzed {name}")
    outcomes = set()
    for _ in range(60):
        data = whole[: rng.integers(1, len(whole) + 1)].copy() if rng.random() < 0.3 else whole.copy()
        # Headers lie at the ends of a file: half of the damage goes there.
        places = rng.integers(0, len(data), rng.integers(1, 30))
        places = np.where(rng.random(len(places)) < 0.5, places % 600 - 300, places) % len(data)
        data[places] = rng.integers(0, 256, len(places), dtype=np.uint8)
        path.write_bytes(data.tobytes())
        try:
            clip = read_clip(path, FrameChoice(4), GRAY, draw=rng.random())
            assert clip.shape[:2] == (1, 4)
            outcomes.add("clip")
        except BadClip:
            outcomes.add("bad")
    assert outcomes == {"clip", "bad"}


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(BadClip, match="not a regular file"):
        read_clip(tmp_path / "a.mp4", FrameChoice(4), GRAY)


def test_a_playlist_that_calls_itself_a_film_opens_nothing(videos: dict[str, Path], tmp_path: Path) -> None:
    secret = videos["h264 with B-frames.mp4"]
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:{secret}\n#EXT-X-ENDLIST\n")
    (tmp_path / "b.avi").write_text(f"ffconcat version 1.0\nfile '{secret}'\n")
    for name in ("a.mp4", "b.avi"):
        with pytest.raises(BadClip):
            read_clip(tmp_path / name, FrameChoice(4), GRAY)


# --- row 23: bombs -----------------------------------------------------------------------------------------------


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to decode a frame fails the test."""
    monkeypatch.setattr(video, "_frames", lambda *_: pytest.fail("a frame was decoded"))


def patched(path: Path, name: str, changes: list[tuple[bytes, int, str, int]]) -> Path:
    """A copy of an MP4 with header fields changed: (box, offset behind its name, format, value)."""
    data = bytearray(path.read_bytes())
    for box, offset, kind, value in changes:
        struct.pack_into(kind, data, data.index(box) + 4 + offset, value)
    copy = path.with_name(name)
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (8_000, 5_000), (65_535, 600)])
@pytest.mark.usefixtures("undecoded")
def test_huge_frames_are_refused_on_the_header(tmp_path: Path, width: int, height: int) -> None:
    path = write_video(tmp_path / "a.avi", numbered(4), codec="ffv1", pix_fmt="gray")
    bomb = patched(path, "bomb.avi", [(b"strf", 8, "<I", width), (b"strf", 12, "<I", height)])
    found = (
        "no frame size, or one that FFmpeg refuses" if width == height else f"frames of {width}×{height} pixels, more"
    )
    with pytest.raises(BadClip, match=f"the header declares {found}"):
        read_clip(bomb, FrameChoice(4), GRAY)
    with pytest.raises(BadClip):
        header_size(bomb)


@pytest.mark.usefixtures("undecoded")
def test_the_size_that_a_stream_itself_declares_counts(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", HEIGHT * WIDTH - 1)
    for path in videos.values():
        with pytest.raises(BadClip, match=rf"declares frames of {WIDTH}×{HEIGHT} pixels"):
            read_clip(path, FrameChoice(4), GRAY)


def test_a_stream_with_larger_frames_than_its_container_declares_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(4, 320, 640), codec="mjpeg", pix_fmt="yuvj420p")
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 320 * 640 - 1)
    monkeypatch.setattr(video, "_judge", lambda *_: None)
    with pytest.raises(BadClip):
        read_clip(path, FrameChoice(4), GRAY)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 321 * 640)
    read_clip(path, FrameChoice(4), GRAY)


@pytest.mark.usefixtures("undecoded")
def test_a_strip_is_refused_before_scaling_blows_it_up(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((2, 2, 8192), np.uint8), codec="ffv1", pix_fmt="gray")
    with pytest.raises(BadClip, match="too long a strip"):
        read_clip(path, FrameChoice(2), GRAY, size=(256, 256))


@pytest.mark.usefixtures("undecoded")
def test_absurd_lengths_are_refused_on_the_header(videos: dict[str, Path]) -> None:
    film = videos["h264.mov"]
    years = patched(film, "years.mov", [(b"mdhd", 12, ">I", 1), (b"stts", 12, ">I", 1_000_000)])
    with pytest.raises(BadClip, match=r"seconds, more than 86,400"):
        read_clip(years, FrameChoice(4), GRAY)


COUNTS = {
    "sizes": [(b"stsz", 4, ">I", 1), (b"stsz", 8, ">I", 60_000_000), (b"stsc", 12, ">I", 60_000_000)],
    "times": [(b"stts", 8, ">I", 60_000_000)],
}


@pytest.mark.parametrize("kind", COUNTS)
def test_absurd_frame_counts_are_refused_before_ffmpeg_makes_a_table_of_them(
    videos: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = patched(videos["h264.mov"], f"many {kind}.mov", COUNTS[kind])
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(BadClip, match=r"declares 60,000,0\d\d samples \(st\w\w\) in [\d,]+ bytes"):
        read_clip(many, FrameChoice(4), GRAY)


def test_absurd_counts_in_fragments_are_refused_too(tmp_path: Path) -> None:
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    run = box(b"trun", struct.pack(">II", 0, 2**31))
    for name, data in {
        "fragment": box(b"moof", box(b"traf", run)),
        "wide": struct.pack(">I4sQ", 1, b"moof", 24 + len(run)) + struct.pack(">I4s", 0, b"traf") + run,
        "hidden": box(b"free", box(b"moof", box(b"traf", run))),
        "compressed": box(b"moov", box(b"cmov", b"")),
    }.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(box(b"ftyp", b"isom") + data)
        with pytest.raises(BadClip, match=r"2,147,483,648 samples|cmov"):
            require_credible_counts(path)
