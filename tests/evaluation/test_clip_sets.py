"""Clips to measure, in every form, good and bad."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.chunks import ChunkStore
from acdit.errors import ConfigError, DataError
from acdit.evaluation.clip_files import ClipCut, read_video
from acdit.evaluation.clip_sets import open_clips, stored_clips
from acdit.evaluation.image_sets import open_images
from acdit.evaluation.reference import open_reference
from tests.evaluation.clips import frame_folders, gifs, npz, random_clips

CLIPS = random_clips(frames=12)
GRAY = random_clips(frames=12, channels=1)
CUT = ClipCut(frames=4, stride=3)


def tchw(clips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clips).movedim(-1, 2)


def test_npz_frames_and_parts_give_the_same_clips(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "store", {"seed": 7}, 3, 2)
    store.save(0, {"images": tchw(CLIPS[:2])})
    store.save(1, {"images": tchw(CLIPS[2:])})
    np.savez_compressed(tmp_path / "packed.npz", arr_0=CLIPS)
    sets = {
        "npz": open_clips(npz(tmp_path / "plain.npz", arr_0=CLIPS), CUT, 3),
        "packed": open_clips(str(tmp_path / "packed.npz"), CUT, 3),
        "frames": open_clips(str(frame_folders(tmp_path / "frames", CLIPS)), CUT, 3),
        "store": stored_clips(store, CUT, 3),
    }
    for name, clips in sets.items():
        assert len(clips) == 3, name
        assert clips.kind == "clips"
        assert torch.equal(clips.read(1, 3), tchw(CLIPS)[1:, [0, 3, 6, 9]]), name
        assert (clips.description["frames"], clips.description["frame_stride"]) == (4, 3)
    assert sets["store"].settings == {"seed": 7}
    assert isinstance(sets["npz"]._array, np.memmap)  # type: ignore[attr-defined]


def test_gifs_give_the_same_clips_as_the_npz(tmp_path: Path) -> None:
    gif = open_clips(str(gifs(tmp_path / "gifs", GRAY)), CUT, 1)
    assert torch.equal(gif.read(0, 3), open_clips(npz(tmp_path / "a.npz", arr_0=GRAY), CUT, 1).read(0, 3))
    colour = open_clips(str(tmp_path / "gifs"), CUT, 3)
    assert torch.equal(colour.read(0, 3), gif.read(0, 3).expand(-1, -1, 3, -1, -1))


def test_an_avi_gives_the_same_clips_as_the_npz(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clips = random_clips(2, 6, 16, 16)
    for index, clip in enumerate(clips):
        with av.open(str(tmp_path / f"{index}.avi"), "w") as container:
            stream = container.add_stream("ffv1", rate=8)  # exact
            stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    found = open_clips(str(tmp_path), ClipCut(3, 2), 3).read(0, 2)
    assert torch.equal(found, tchw(clips)[:, [0, 2, 4]])


def test_of_a_video_no_more_is_decoded_than_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV is in the extra video")
    from acdit.data import video
    from tests.data.videos import numbered, numbers, write_video

    write_video(tmp_path / "a.avi", numbered(40), codec="mjpeg", pix_fmt="yuvj420p")
    decoded, frames = 0, video._frames

    def counting(*arguments: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in frames(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(video, "_frames", counting)
    clip = read_video(tmp_path / "a.avi", CUT, 3, None)
    assert (tuple(clip.shape[:2]), clip.dtype) == ((4, 3), torch.uint8)
    assert numbers(clip.transpose(0, 1)) == [0, 3, 6, 9]
    assert decoded == 10


def test_a_video_that_training_would_refuse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV is in the extra video")
    from tests.data.videos import small_video

    small_video(tmp_path / "a.mp4")
    too_long = r"a\.mp4; found a clip of 12 frames; expected at least 13 \(--frames 13\)\. Fix: .*--frames 12"
    with pytest.raises(DataError, match=too_long):
        open_clips(str(tmp_path), ClipCut(13)).read(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr("acdit.data.video.MAX_FRAME_PIXELS", 1000)
        with pytest.raises(DataError, match=r"a\.mp4; found a bad clip \(the header declares frames of 64×32"):
            open_clips(str(tmp_path), CUT).read(0, 1)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.mp4; found a bad clip"):
        open_clips(str(tmp_path), CUT).read(0, 1)


def test_a_gif_with_huge_frames_is_refused_on_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acdit.evaluation.clip_files.MAX_PIXELS", 23)
    with pytest.raises(DataError, match=r"0\.gif; found a bad clip \(the header declares 4×6 pixels a frame"):
        open_clips(str(gifs(tmp_path, GRAY)), CUT).read(0, 1)


def test_gray_clips_are_one_channel_or_three_equal_ones_as_wanted(tmp_path: Path) -> None:
    one, three = npz(tmp_path / "1.npz", arr_0=GRAY), npz(tmp_path / "3.npz", arr_0=GRAY.repeat(3, axis=-1))
    for where in (one, three):
        assert torch.equal(open_clips(where, CUT, 1).read(0, 3), tchw(GRAY)[:, [0, 3, 6, 9]])
        assert open_clips(where, CUT, 3).read(0, 3).shape == (3, 4, 3, 6, 4)
    with pytest.raises(DataError, match=r"arr_0\[1\].*colour"):
        open_clips(npz(tmp_path / "colour.npz", arr_0=CLIPS), CUT, 1).read(1, 3)


def test_frames_are_resized_and_cropped_as_pictures_are(tmp_path: Path) -> None:
    clips = random_clips(frames=4, height=12, width=16)
    resized = open_clips(str(frame_folders(tmp_path / "a", clips)), ClipCut(4), 3, size=6).read(0, 1)
    assert resized.shape == (1, 4, 3, 6, 6)
    for number, frame in enumerate(clips[0]):
        (tmp_path / f"p{number}").mkdir()
        Image.fromarray(frame).save(tmp_path / f"p{number}" / "0.png")
        assert torch.equal(open_images(str(tmp_path / f"p{number}"), 3, size=6).read(0, 1)[0], resized[0, number])
    with pytest.raises(ConfigError, match="only they are resized"):
        open_clips(npz(tmp_path / "a.npz", arr_0=clips), ClipCut(4), 3, size=6)


def test_what_sampling_left_beside_its_clips_is_known(tmp_path: Path) -> None:
    folder = frame_folders(tmp_path / "out", CLIPS)
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(folder / "grid.png")
    (folder / "settings.json").write_text(json.dumps({"seed": 3}))
    clips = open_clips(str(folder), CUT)
    assert (len(clips), clips.settings) == (3, {"seed": 3})


def test_the_description_changes_with_the_files_and_with_the_frames_taken(tmp_path: Path) -> None:
    folder = frame_folders(tmp_path / "out", CLIPS)
    before = open_clips(str(folder), CUT).description
    assert open_clips(str(folder), CUT).description == before
    assert open_clips(str(folder), ClipCut(4, 2)).description != before
    Image.fromarray(CLIPS[0, 0, ::-1].copy()).save(folder / "clip 1" / "3.png")
    assert open_clips(str(folder), CUT).description != before


def test_clips_that_are_too_short_are_named(tmp_path: Path) -> None:
    long = ClipCut(frames=5, stride=3)
    message = r"found a clip of 12 frames; expected at least 13 \(--frames 5 at --frame-stride 3\)\. Fix: .*--frames 4"
    with pytest.raises(DataError, match=r"a\.npz: arr_0; " + message):
        open_clips(npz(tmp_path / "a.npz", arr_0=CLIPS), long)
    with pytest.raises(DataError, match=r"clip 0; " + message):
        open_clips(str(frame_folders(tmp_path / "frames", CLIPS)), long).read(0, 1)
    with pytest.raises(DataError, match=r"0\.gif; " + message):
        open_clips(str(gifs(tmp_path / "gifs", GRAY)), long).read(0, 1)
    store = ChunkStore(tmp_path / "store", {}, 1, 1)
    store.save(0, {"images": tchw(CLIPS[:1])})
    with pytest.raises(DataError, match=message):
        stored_clips(store, long)
    open_clips(str(tmp_path / "frames"), ClipCut(4, 3)).read(0, 3)  # what the message says helps


def test_bad_clips_are_named(tmp_path: Path) -> None:
    folder = frame_folders(tmp_path / "a", CLIPS)
    Image.fromarray(CLIPS[0, 0, :3]).save(folder / "clip 1" / "3.png")
    with pytest.raises(DataError, match=r"clip 1; found a bad clip \(3\.png: another size"):
        open_clips(str(folder), CUT).read(0, 3)
    (folder / "clip 1" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"clip 1; found a bad clip \(3\.png"):
        open_clips(str(folder), CUT).read(0, 3)
    for number in range(12):
        Image.fromarray(CLIPS[0, 0, :3]).save(folder / "clip 1" / f"{number}.png")
    with pytest.raises(DataError, match=r"clip 1; found 4×3 pixels; expected 4×6, as .*clip 0 has"):
        open_clips(str(folder), CUT).read(0, 3)
    films = gifs(tmp_path / "b", GRAY)
    (films / "1.gif").write_bytes((films / "1.gif").read_bytes()[:60])
    with pytest.raises(DataError, match=r"1\.gif"):
        open_clips(str(films), CUT).read(0, 3)


def test_without_pyav_a_video_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"acdit\[video\]"):
        open_clips(str(tmp_path), CUT).read(0, 1)


def test_places_without_clips(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for name, message in (("empty", "no clips"), ("nothing", "no such"), ("a.txt", "another kind")):
        with pytest.raises(DataError, match=message):
            open_clips(str(tmp_path / name), CUT)
    both = gifs(frame_folders(tmp_path / "both", CLIPS), GRAY)
    with pytest.raises(DataError, match=r"3 videos and 3 folders of frames; expected clips of one kind"):
        open_clips(str(both), CUT)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(CLIPS[0, 0]).save(pictures / "a.png")
    with pytest.raises(DataError, match=r"1 pictures and no clips.*Fix: pictures are measured without --frames"):
        open_clips(str(pictures), CUT)


def test_npz_files_of_the_other_kind_say_which(tmp_path: Path) -> None:
    pictures, clips = npz(tmp_path / "p.npz", arr_0=CLIPS[0]), npz(tmp_path / "c.npz", arr_0=CLIPS)
    with pytest.raises(DataError, match=r"\(12, 6, 4, 3\); expected uint8 \(M, T, H, W, C\).*without --frames"):
        open_clips(pictures, CUT)
    with pytest.raises(DataError, match=r"\(3, 12, 6, 4, 3\); expected uint8 \(M, H, W, C\).*--frames N"):
        open_images(clips)


def test_a_reference_of_clips_may_have_statistics_as_well(tmp_path: Path) -> None:
    both = npz(tmp_path / "both.npz", arr_0=CLIPS, mu=np.zeros(4), sigma=np.eye(4))
    reference = open_reference(both, 3, cut=CUT)
    assert reference.images is not None
    assert reference.images.kind == "clips"
    assert set(reference.statistics) == {"pooled"}
    assert open_reference(npz(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4)), 3, cut=CUT).images is None
