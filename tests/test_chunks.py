from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from acdit import storage
from acdit.chunks import ChunkStore, make_missing
from acdit.errors import ConfigError, StorageError
from acdit.processes import Processes


class Maker:
    """Squares of the indices; remembers what it was asked for, and may die at a chunk."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.dies_at = dies_at

    def __call__(self, start: int, stop: int) -> Mapping[str, Tensor]:
        if start == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        return {"squares": torch.arange(start, stop) ** 2}


def store(path: Path, total: int = 10, chunk_size: int = 4, **description: object) -> ChunkStore:
    return ChunkStore(path / "work", {"seed": 0, **description}, total, chunk_size)


def everything(one: ChunkStore) -> list[int]:
    return torch.cat([chunk["squares"] for chunk in one]).tolist()


def test_chunks_cover_every_item_once_in_order(tmp_path: Path) -> None:
    maker = Maker()
    make_missing(store(tmp_path), maker, progress=False)
    assert maker.asked == [(0, 4), (4, 8), (8, 10)]
    assert everything(store(tmp_path)) == [index**2 for index in range(10)]


def test_after_a_kill_only_what_is_missing_is_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_missing(store(tmp_path), Maker(dies_at=8), progress=False)
    again = Maker()
    make_missing(store(tmp_path), again, progress=False)
    assert again.asked == [(8, 10)]
    assert everything(store(tmp_path)) == [index**2 for index in range(10)]


def test_a_damaged_chunk_is_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = store(tmp_path)
    make_missing(one, Maker(), progress=False)
    file = one.path(1) / "data.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again = Maker()
    make_missing(one, again, progress=False)
    assert again.asked == [(4, 8)]
    assert str(one.path(1)) in caplog.text
    assert everything(one) == [index**2 for index in range(10)]


def test_more_items_keep_the_whole_chunks(tmp_path: Path) -> None:
    make_missing(store(tmp_path), Maker(), progress=False)
    more = Maker()
    make_missing(store(tmp_path, total=13), more, progress=False)
    assert more.asked == [(8, 12), (12, 13)]
    assert everything(store(tmp_path, total=13)) == [index**2 for index in range(13)]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    make_missing(store(tmp_path, steps=25), Maker(), progress=False)
    with pytest.raises(StorageError, match="steps: 25 there, 50 now") as refused:
        make_missing(store(tmp_path, steps=50), Maker(), progress=False)
    assert "seed" not in str(refused.value)


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    one = store(tmp_path)
    with storage.RunLock(one.folder), pytest.raises(StorageError, match="in progress"):
        make_missing(one, Maker(), progress=False)


def test_processes_share_the_missing_chunks_without_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "by_first", lambda self, work: list(range(3)))
    monkeypatch.setattr(Processes, "wait_for_all", lambda self: None)
    asked = []
    for rank in range(2):
        maker = Maker()
        make_missing(store(tmp_path), maker, Processes(rank, 2), progress=False)
        asked.append(maker.asked)
    assert asked == [[(0, 4), (8, 10)], [(4, 8)]]


@pytest.mark.parametrize(("total", "size"), [(0, 4), (4, 0)])
def test_nothing_to_do_is_a_mistake(tmp_path: Path, total: int, size: int) -> None:
    with pytest.raises(ConfigError):
        store(tmp_path, total, size)
