"""Labelled clips: folders and lists, bad files, one place for all frames."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is in the extra video")

from acdit.data import ClipsDataset
from acdit.data.frame_choice import FrameChoice
from acdit.errors import ConfigError, DataError
from tests.data.videos import HEIGHT, WIDTH, numbered, numbers, small_video, write_video

FIRST = FrameChoice(4, start="first")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in ("cat/a.mp4", "cat/deep/b.avi", "dog/c.mp4"):
        small_video(folder / "train" / name)
    small_video(folder / "held_out" / "cat" / "x.avi")
    return folder


def copied(root: Path, target: Path) -> Path:
    for path in root.rglob("*.*"):
        (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(root)).write_bytes(path.read_bytes())
    return target


def test_classes_are_folders_and_clips_come_whole(root: Path) -> None:
    data = ClipsDataset(root, channels=1, choice=FIRST)
    assert (data.class_names, data.labels.tolist(), len(data)) == (["cat", "dog"], [0, 0, 1], 3)
    assert data.shape == (1, 4, HEIGHT, WIDTH)
    clip, label = data[1]
    assert (label, clip.dtype, numbers(clip)) == (0, torch.uint8, [0, 1, 2, 3])
    assert [path for path, _ in data.listing()] == ["train/cat/a.mp4", "train/cat/deep/b.avi", "train/dog/c.mp4"]
    assert data.stored_size(0) == (HEIGHT, WIDTH)
    held_out = ClipsDataset(root, "held_out", size=16, choice=FIRST)
    assert (len(held_out), held_out.shape) == (1, (3, 4, 16, 16))
    assert tuple(held_out[0][0].shape) == held_out.shape
    with pytest.raises(DataError, match=r"data\.split 'val'"):
        ClipsDataset(root, "val")


def test_a_split_file_takes_the_place_of_folders(root: Path, tmp_path: Path) -> None:
    (tmp_path / "classInd.txt").write_text("1 dog\n2 cat\n3 cow\n")
    (tmp_path / "list.txt").write_text("dog/c.mp4 1\ncat/deep/b.avi 2\n")
    data = ClipsDataset(root / "train", choice=FIRST, split_file=tmp_path / "list.txt")
    assert (data.class_names, data.labels.tolist()) == (["dog", "cat", "cow"], [0, 1])
    assert data.describe(1).endswith("cat/deep/b.avi")
    assert data[1][1] == 1
    (tmp_path / "list.txt").write_text("dog/c.mp4 1\ncat/none.avi 2\n")
    with pytest.raises(DataError, match=r"1 of 2 clips .* missing, the first cat/none\.avi.*Fix: point data\.root"):
        ClipsDataset(root / "train", split_file=tmp_path / "list.txt")
    with pytest.raises(ConfigError, match=r"data\.split; found 'test', and data\.split_file"):
        ClipsDataset(root / "train", "test", split_file=tmp_path / "list.txt")


def test_where_a_clip_begins_is_drawn_or_the_middle(root: Path) -> None:
    data = ClipsDataset(root, channels=1, choice=FrameChoice(4, 2))
    assert numbers(data[0][0]) == [2, 4, 6, 8]
    assert numbers(data.placed(0, None, 0.0)[0]) == [0, 2, 4, 6]
    assert numbers(data.placed(0, None, 0.999)[0]) == [5, 7, 9, 11]


def test_all_frames_of_a_clip_are_cropped_at_one_place(tmp_path: Path) -> None:
    still = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)[None].repeat(6, axis=0)
    write_video(tmp_path / "cat" / "a.mkv", still, codec="ffv1", pix_fmt="gray")
    data = ClipsDataset(tmp_path, channels=1, size=16, choice=FrameChoice(6))
    places = [[0.1, 0.2, 0.3], [0.9, 0.9, 0.1], None]
    clips = [data.placed(0, place, 0.0)[0] for place in places]
    for clip in clips:
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    assert not torch.equal(clips[0], clips[1])
    from PIL import Image

    from acdit.data.picture import resize_and_crop

    assert np.array_equal(clips[2][0, 0].numpy(), np.asarray(resize_and_crop(Image.fromarray(still[0]), 16)))


def test_without_a_size_all_clips_must_have_one(root: Path, tmp_path: Path) -> None:
    copied(root / "train", tmp_path)
    write_video(tmp_path / "dog" / "z.mp4", numbered(5, 40, 64))
    with pytest.raises(DataError, match=r"z\.mp4; found 64×40 pixels; expected 64×32, as in the first clip.*all clips"):
        ClipsDataset(tmp_path, choice=FIRST)[3]


def test_several_clips_a_file_need_a_start_that_is_free(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.start; found 'first', and 2 clips a file; expected one of the two"):
        ClipsDataset(root, choice=FIRST, clips_per_file=2)
    data = ClipsDataset(root, channels=1, choice=FrameChoice(4, 2), clips_per_file=3)  # 12 frames: 6 places
    assert (data.labels.tolist(), len(data)) == ([0] * 6 + [1] * 3, 9)
    assert [numbers(data[index][0])[0] for index in (3, 4, 5)] == [1, 3, 5]
    assert numbers(data.placed(4, None, 0.0)[0])[0] == 0  # a draw goes before


# --- row 22: bad clips -------------------------------------------------------------------------------------------


def test_bad_clips_are_named_counted_and_replaced(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied(root / "train", tmp_path)
    (tmp_path / "cat" / "b.mp4").write_bytes(b"no video")
    small_video(tmp_path / "cat" / "c.mp4", count=3)
    with pytest.raises(
        DataError, match=r"b\.mp4; found a bad clip .*number 1 of this run; expected at most 0"
    ) as caught:
        ClipsDataset(tmp_path, choice=FIRST)[1]
    assert caught.value.exit_code == 3
    data = ClipsDataset(tmp_path, channels=1, max_bad_files=2, choice=FIRST)
    with caplog.at_level(logging.WARNING):
        assert [label for _, label in (data[index] for index in range(5))] == [0, 0, 0, 0, 1]
    assert len(data.bad_files) == 2
    assert "skipped bad clip" in caplog.text
    assert data.bad_files.reasons[str(tmp_path / "cat" / "c.mp4")] == "3 frames, 4 needed"
    assert data.file_at(1) == str(tmp_path / "cat" / "deep" / "b.avi")
    looped = ClipsDataset(tmp_path, channels=1, max_bad_files=1, choice=FrameChoice(4, start="first", short="loop"))
    assert numbers(looped[2][0]) == [0, 1, 2, 0]


def test_what_stands_at_an_index_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    """A file that is damaged in its second half only."""
    path, other = tmp_path / "cat" / "a.avi", tmp_path / "cat" / "b.avi"
    small_video(path, count=40, options={"g": "10"})
    write_video(other, numbered(80)[40:], codec="mpeg4")
    data = bytearray(path.read_bytes())
    for place in range(int(0.8 * len(data)), int(0.82 * len(data))):  # the index lies behind
        data[place] ^= 0xFF
    path.write_bytes(data)

    def read(draws: list[float]) -> list[list[int]]:
        clips = ClipsDataset(tmp_path, channels=1, max_bad_files=1, choice=FrameChoice(4))
        return [numbers(clips.placed(0, None, draw)[0]) for draw in draws]

    early, late = [0, 1, 2, 3], [76, 77, 78, 79]
    assert read([0.0, 0.99]) == [early, late]
    assert read([0.99, 0.0, 0.99]) == [late, early, late]


def test_a_strip_is_refused_before_it_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "cat" / "a.mkv", np.zeros((2, 2, 8192), np.uint8), codec="ffv1", pix_fmt="gray")
    monkeypatch.setattr("acdit.data.video._frames", lambda *_: pytest.fail("a frame was decoded"))
    data = ClipsDataset(tmp_path, size=256, choice=FrameChoice(2), max_bad_files=1)
    with pytest.raises(DataError, match="no readable clip"):
        data[0]
    assert "too long a strip" in next(iter(data.bad_files.reasons.values()))


def test_the_stored_size_of_a_bad_clip_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.mp4").write_bytes(b"no video")
    assert ClipsDataset(tmp_path, size=8).stored_size(0) is None


def test_a_class_with_nothing_readable_stops_whatever_the_limit(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"cat; found no readable clip in this class"):
        ClipsDataset(tmp_path, max_bad_files=9)[0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda root: root / "none",
            r"data\.root .*none; found no such directory; expected a directory with one folder",
        ),
        (lambda root: small_video(root / "a.mp4"), r"data\.root .*a\.mp4; found a file"),
        (lambda root: small_video(root / "a.mp4").parent, r"found clips outside any class folder"),
        (lambda root: small_video(root / ".cat" / "a.mp4").parents[1], r"no class folders but hidden ones"),
    ],
)
def test_a_wrong_root_is_refused(tmp_path: Path, make: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        ClipsDataset(make(tmp_path))


def test_loader_workers_and_copies_read_the_same(root: Path) -> None:
    data = ClipsDataset(root, channels=1, choice=FIRST)
    whole = torch.stack([data[index][0] for index in range(3)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([clips for clips, _ in loader]), whole)
    assert torch.equal(pickle.loads(pickle.dumps(data))[0][0], whole[0])


def test_without_pyav_the_fix_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"data\.kind=clips; found no library `av`.*pip install 'acdit\[video\]'"):
        ClipsDataset(root)
