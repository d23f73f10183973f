"""Rows 20 to 22 of the reliability bar at length: folders, labels and damaged files at random.

Every campaign has a short form of a few cases, which each run of the tests makes. Files that are damaged at random are
read in a process of their own in the long form, so that a crash would be seen as one.
"""

from __future__ import annotations

import functools
import gzip
import random
import shutil
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acdit.data import HFDataset, IdxDataset, ImagesDataset, ShardsDataset
from acdit.data.bad_files import logger as bad_files_logger
from acdit.data.labelled import LabelledPictures
from acdit.errors import AcditError, DataError
from acdit.training.build import build
from tests.data.pictures import png, write_tar
from tests.faults.campaigns import LONG, in_own_process, peak_megabytes, reset_peak, short_and_long
from tests.faults.conftest import Tally
from tests.faults.mutations import damaged, seeds
from tests.training.runs import tiny_recipe

MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 3, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 8,
}  # fmt: skip


# --- rows 20 and 21: folders of classes, and how many there are ---------------------------------------------------

NAMES = ("cat", "Dog", "n01440764", "a b", "Äpfel", "0", "10", "2", "x.y", "CAT")


def _layout(rng: random.Random) -> tuple[dict[str, bytes], list[str], list[str], dict[str, int], bool]:
    """Files, empty folders, the visible classes with their numbers of pictures, and whether all lies in a zip."""
    zipped = rng.random() < 0.4
    prefix = rng.choice(("", "train/"))
    wrapped = zipped and rng.random() < 0.3
    prefix = "pets-1.0/" * wrapped + prefix
    sizes = {
        name: rng.choice((0, 1, 1, 2, 3)) if rng.random() < 0.4 else 2 for name in rng.sample(NAMES, rng.randint(0, 5))
    }
    files: dict[str, bytes] = {}
    folders = [f"{prefix}{name}" for name in sizes]
    for name, count in sizes.items():
        for index in range(count):
            deep = "deep/" if index and rng.random() < 0.2 else ""
            files[f"{prefix}{name}/{deep}{index}{rng.choice(('.png', '.PNG'))}"] = png(index)
        if rng.random() < 0.3:
            files[f"{prefix}{name}/{rng.choice(('notes.txt', '.hidden.png', '.x/a.png'))}"] = png()
    hidden = [f"{prefix}{name}" for name in rng.sample((".git", ".cache"), rng.randint(0, 2))]
    files |= {f"{name}/a.png": png() for name in hidden}
    if not wrapped and rng.random() < 0.3:
        files[f"{prefix}readme.md"] = b"x"
    return files, folders, hidden, sizes, zipped


def _write(place: Path, files: dict[str, bytes], folders: list[str], zipped: bool) -> Path:
    if zipped:
        with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
            for folder in folders:
                archive.writestr(f"{folder}/", b"")
            for name, data in files.items():
                archive.writestr(name, data)
        return place.with_suffix(".zip")
    place.mkdir()
    for name in folders:
        (place / name).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


@short_and_long(40, 3000)
def test_folders_at_random_are_classes_or_refused_by_path(cases: int, tmp_path: Path, tally: Tally) -> None:
    rng = random.Random(20)
    for case in range(cases):
        files, folders, _, sizes, zipped = _layout(rng)
        root = _write(tmp_path / f"data-{case}", files, folders, zipped)
        classes = rng.choice((len(sizes), len(sizes), len(sizes) + 1, len(sizes) - 1, 1000))
        empty = sorted(name for name, count in sizes.items() if not count)
        recipe = tiny_recipe(
            model={**MODEL, "num_classes": max(1, classes)}, data={"kind": "images", "root": str(root), "size": 8}
        )
        if not sizes or empty:
            with pytest.raises(DataError) as caught:
                build(recipe)
            assert str(root) in str(caught.value)
            assert "<root>/<class>/*.png" in str(caught.value)
            if empty and not (zipped and len(sizes) == 1):
                assert empty[0] in str(caught.value), f"{case}: {caught.value}"
            tally["no class" if not sizes else "an empty class"] += 1
        elif max(1, classes) != len(sizes):
            with pytest.raises(DataError, match=rf"{max(1, classes)}, and {len(sizes)} classes") as caught:
                build(recipe)
            tally["another number of classes than the model's"] += 1
        else:
            dataset = build(recipe).dataset
            assert dataset.class_names == sorted(sizes)
            assert np.bincount(np.asarray(dataset.labels)).tolist() == [sizes[name] for name in sorted(sizes)]  # type: ignore[union-attr]
            tally["read"] += 1
            continue
        assert caught.value.exit_code == 3


@short_and_long(20, 1000)
@pytest.mark.parametrize("kind", ["webdataset", "idx"])
def test_labels_at_random_fit_the_model_or_are_refused(kind: str, cases: int, tmp_path: Path, tally: Tally) -> None:
    rng = random.Random(kind)
    for case in range(cases):
        highest = rng.choice((0, 1, 9, 10, 255) if kind == "idx" else (0, 1, 9, 10, 255, 2**21, 10**9, 2**31, 2**70))
        lowest = rng.choice((0, 0, -1)) if kind == "webdataset" else 0
        labels = [0] * 3 + [lowest, highest]
        classes = rng.choice((highest + 1, highest, 10)) if highest < 1000 else 10
        root = tmp_path / f"data-{case}"
        root.mkdir()
        if kind == "idx":
            pictures, axes = bytes(5 * 64), struct.pack(">III", 5, 8, 8)
            (root / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + axes + pictures)
            (root / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 5) + bytes(labels))
        else:
            members = {f"{i}.{end}": data for i, label in enumerate(labels)
                       for end, data in (("png", png(i)), ("cls", str(label).encode()))}  # fmt: skip
            write_tar(root / "s.tar", members)
        recipe = tiny_recipe(
            model={**MODEL, "num_classes": max(1, classes)}, data={"kind": kind, "root": str(root), "size": 8}
        )
        if lowest == 0 and highest + 1 == max(1, classes):
            assert build(recipe).dataset.num_classes == highest + 1
            tally["read"] += 1
            continue
        with pytest.raises(DataError) as caught:
            build(recipe)
        assert caught.value.exit_code == 3
        assert str(root) in str(caught.value) or "model.num_classes" in str(caught.value)
        tally["refused"] += 1


# --- row 22: damaged pictures, and damaged files of pictures ------------------------------------------------------


def open_pictures(kind: str, place: Path, files: dict[str, bytes], max_bad_files: int) -> LabelledPictures:
    """These files as a data set of a kind; a name's first letter is its class."""
    options: dict[str, Any] = {"size": 16, "max_bad_files": max_bad_files}
    if kind == "hf":
        import datasets

        datasets.disable_progress_bars()
        for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME"):
            setattr(datasets.config, name, str(place / "cache"))
        datasets.config.HF_HUB_OFFLINE = True
        if not (place / "table").exists():
            (place / "table").mkdir(parents=True)
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
            cells = [{"bytes": data, "path": None} for data in files.values()]
            table = {"image": cells, "label": [name[0] for name in files]}
            datasets.Dataset.from_dict(table, features=features).to_parquet(str(place / "table" / "0.parquet"))
        return HFDataset(str(place / "table"), **options)
    if kind == "tar":
        members: dict[str, bytes] = {}
        for index, (name, data) in enumerate(files.items()):
            members |= {f"{index:04d}.{name.rpartition('.')[2]}": data, f"{index:04d}.txt": name[0].encode()}
        return ShardsDataset(str(write_tar(place / "s.tar", members)), **options)
    named = {f"{name[0]}/{name}": data for name, data in files.items()}
    if kind == "folder" and (place / "data").exists():
        return ImagesDataset(place / "data", **options)
    place.mkdir(exist_ok=True)
    return ImagesDataset(_write(place / "data", named, [], zipped=kind == "zip"), **options)


def _refusal(action: Callable[[], object]) -> AcditError | None:
    """The error of ours that an action ends with; any other goes through."""
    try:
        action()
    except AcditError as error:
        return error
    return None


def mutated_pictures(kind: str, rounds: int, seed: int, directory: str) -> dict[str, Any]:
    """Read data sets of 40 damaged files each; counts of outcomes, the slowest file and the growth of memory."""
    rng, sound = random.Random(f"{kind} {seed}"), seeds()
    outcomes: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    bad_files_logger.disabled = True
    torch.set_num_threads(1)
    for number in range(rounds):
        files = {"a-000-sound.png": png(1), "b-000-sound.png": png(2)}
        for index in range(1, 41):
            name = rng.choice(sorted(sound))
            files[f"{rng.choice('ab')}-{index:03d}-{name}"] = damaged(sound[name], rng)
        place = Path(directory) / f"{kind}-{number}"
        data = open_pictures(kind, place, files, max_bad_files=len(files))
        before = reset_peak()
        for index in range(len(data)):
            started = time.perf_counter()
            picture, _ = data[index]
            slowest = max(slowest, time.perf_counter() - started)
            assert picture.shape == (3, 16, 16)
            assert picture.dtype == torch.uint8
            outcomes["named as bad" if data.describe(index) in data.bad_files else "decoded"] += 1
        largest = max(largest, peak_megabytes() - before)
        assert len(data) == 42
        assert not [name for name in data.bad_files.reasons if "sound" in name]
        first_bad = next((data.describe(i) for i in range(42) if data.describe(i) in data.bad_files), None)
        strict = open_pictures(kind, place, files, max_bad_files=0)
        refusal = _refusal(functools.partial(_all_of, strict))
        if first_bad is None:
            assert refusal is None
        else:
            assert refusal is not None
            assert refusal.exit_code == 3
            assert str(refusal).startswith(f"{first_bad};"), refusal
        shutil.rmtree(place, ignore_errors=True)
    outcomes["decoded"] -= 2 * rounds  # the sound ones
    bad_files_logger.disabled = False
    return {"outcomes": dict(outcomes), "slowest": round(slowest, 2), "growth_mb": largest}


@pytest.fixture
def _caches_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `open_pictures` changes of the library's settings is put back."""
    config = pytest.importorskip("datasets").config
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.setattr(config, name, getattr(config, name))


@pytest.mark.usefixtures("_caches_of_datasets")
@short_and_long(1, 60)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "hf"])
def test_a_picture_damaged_at_random_is_decoded_or_named(kind: str, cases: int, tmp_path: Path, tally: Tally) -> None:
    """`cases` data sets of 40 damaged files, of which every file is one case."""
    if cases == 1:
        found = mutated_pictures(kind, 1, 0, str(tmp_path))
    else:
        found = in_own_process(mutated_pictures, kind, cases, 1, str(tmp_path))
    tally.update(found["outcomes"])
    tally.figures |= {"slowest_seconds": found["slowest"], "growth_mb": found["growth_mb"]}
    assert sum(found["outcomes"].values()) == 40 * cases
    assert min(found["outcomes"].values()) >= 2 * cases, "both happen"
    assert found["slowest"] < 5
    assert found["growth_mb"] < 1000


def _sound_container(kind: str, place: Path) -> Path:
    """A small file of pictures of a kind; its damaged form is what is read."""
    pictures = {f"{name}-{index}.png": png(index) for index in range(3) for name in "ab"}
    if kind == "zip":
        with zipfile.ZipFile(place / "data.zip", "w") as archive:
            for number, (name, data) in enumerate(pictures.items()):
                method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
                archive.writestr(f"{name[0]}ä/{name}", data, method)
        return place / "data.zip"
    if kind == "tar":
        return write_tar(place / "s.tar", {f"{i}.{end}": data for i in range(4)
                                           for end, data in (("png", png(i)), ("cls", b"1"))})  # fmt: skip
    if kind in ("idx", "idx.gz"):
        end, pack = (".gz", gzip.compress) if kind == "idx.gz" else ("", bytes)
        labels = b"\0\0\x08\x01" + struct.pack(">I", 5) + bytes(range(5))
        (place / f"train-labels-idx1-ubyte{end}").write_bytes(pack(labels))
        file = place / f"train-images-idx3-ubyte{end}"
        file.write_bytes(pack(b"\0\0\x08\x03" + struct.pack(">III", 5, 8, 8) + bytes(range(64)) * 5))
        return file
    open_pictures("hf", place, pictures, 0)
    return place / "table" / "0.parquet"


def _open_container(kind: str, file: Path) -> Any:
    options: dict[str, Any] = {"size": 8, "max_bad_files": 99}
    if kind == "zip":
        return ImagesDataset(file, **options)
    if kind == "tar":
        return ShardsDataset(str(file), **options)
    if kind == "hf":
        return HFDataset(str(file), **options)
    return IdxDataset(file.parent, size=8)


def _all_of(data: Any) -> None:
    for index in range(len(data)):
        data[index]


def mutated_containers(kind: str, cases: int, seed: int, directory: str) -> dict[str, Any]:
    """Read a damaged zip, tar, idx file or parquet file `cases` times; counts of outcomes."""
    rng, place = random.Random(f"{kind} {seed}"), Path(directory) / kind
    place.mkdir()
    file = _sound_container(kind, place)
    sound, outcomes, before = file.read_bytes(), Counter[str](), reset_peak()
    bad_files_logger.disabled = True
    assert len(_open_container(kind, file)) >= 4
    for _ in range(cases):
        file.write_bytes(damaged(sound, rng))
        refusal = _refusal(lambda: _all_of(_open_container(kind, file)))
        if refusal is not None:
            assert refusal.exit_code in (2, 3)
            assert str(place) in str(refusal), refusal
        outcomes["read" if refusal is None else "refused by name"] += 1
        if kind == "hf":
            shutil.rmtree(place / "cache", ignore_errors=True)
    bad_files_logger.disabled = False
    return {"outcomes": dict(outcomes), "growth_mb": peak_megabytes() - before}


@pytest.mark.usefixtures("_caches_of_datasets")
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        *((kind, 30) for kind in ("zip", "tar", "idx", "idx.gz")),
        *(
            pytest.param(kind, cases, marks=LONG)
            for kind, cases in (("zip", 6000), ("tar", 6000), ("idx", 6000), ("idx.gz", 6000), ("hf", 300))
        ),
    ],
)
def test_a_file_of_pictures_damaged_at_random_is_read_or_refused(
    kind: str, cases: int, tmp_path: Path, tally: Tally
) -> None:
    if cases == 30:
        found = mutated_containers(kind, cases, 0, str(tmp_path))
    else:
        found = in_own_process(mutated_containers, kind, cases, 1, str(tmp_path))
    tally.update(found["outcomes"])
    tally.figures["growth_mb"] = found["growth_mb"]
    assert sum(found["outcomes"].values()) == cases
    assert found["outcomes"]["refused by name"] >= cases // 10
    assert found["growth_mb"] < 500
