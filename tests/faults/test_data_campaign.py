"""Rows 20 to 23 of the reliability bar at length: folders, labels, damaged files and bombs at random.

Every campaign has a short form of a few cases, which each run of the tests makes. Files that are damaged at random are
read in a process of their own in the long form, so that a crash would be seen as one.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
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
from acdit.data.picture import BadPicture, decode_picture
from acdit.errors import AcditError, DataError
from acdit.training.build import build
from tests.data.pictures import png, write_tar
from tests.faults.campaigns import LONG, peak_megabytes, reset_peak, short_and_long
from tests.faults.conftest import Tally
from tests.faults.mutations import PICTURE_BOMBS, damaged, seeds
from tests.training.runs import tiny_recipe

MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 3, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 8,
}  # fmt: skip
ROOT = Path(__file__).parents[2]


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function of this module gives, called in a fresh interpreter; a crash or a hang fails the test."""
    code = f"import json, sys; from {__name__} import {function.__name__} as f; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(f(*json.loads(sys.argv[1]))))", json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=3500,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


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


# --- row 23: bombs ------------------------------------------------------------------------------------------------

_MEGABYTES = 300
_GROWTH_MB = 120


def _zip_bomb(file: Path, method: int, honest: bool) -> Callable[[], Any]:
    """One entry that unpacks to 300 MB; its directory says so, or says 1,000 bytes."""
    info = zipfile.ZipInfo("cat/a.png")
    info.compress_type = method
    with zipfile.ZipFile(file, "w") as archive, archive.open(info, "w") as entry:
        for _ in range(_MEGABYTES):
            entry.write(bytes(1_000_000))
    if not honest:
        content, true = bytearray(file.read_bytes()), struct.pack("<I", _MEGABYTES * 1_000_000)
        assert content.count(true)
        file.write_bytes(content.replace(true, struct.pack("<I", 1000)))
    return lambda: ImagesDataset(file)[0]


def _tar_bomb(file: Path, kind: bytes, size: int) -> Callable[[], Any]:
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.size = kind, size
    file.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    return lambda: ShardsDataset(str(file))


def _tar_of_names(file: Path) -> Callable[[], Any]:
    """Three thousand headers "here comes a long name", one behind the other."""
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 8
    file.write_bytes((entry.tobuf(tarfile.GNU_FORMAT) + b"a.png".ljust(512, b"\0")) * 3000 + bytes(10240))
    return lambda: ShardsDataset(str(file))


def _idx_bomb(place: Path, axes: tuple[int, int, int], packed: bool) -> Callable[[], Any]:
    """Pictures whose header declares what the file does not hold, or which unpack to more than declared."""
    place.mkdir()
    header = b"\0\0\x08\x03" + struct.pack(">III", *axes)
    if packed:
        with gzip.open(place / "train-images-idx3-ubyte.gz", "wb") as file:
            file.write(header)
            for _ in range(_MEGABYTES):
                file.write(bytes(1_000_000))
    else:
        (place / "train-images-idx3-ubyte").write_bytes(header + bytes(1000))
    (place / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 1) + b"\0")
    return lambda: IdxDataset(place)


def container_bombs(place: Path) -> dict[str, Callable[[], Any]]:
    """What reads each of them."""
    methods = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    return {
        "zip entry that declares 300 MB": _zip_bomb(place / "honest.zip", zipfile.ZIP_DEFLATED, honest=True),
        **{
            f"zip entry of 300 MB ({name}) that declares 1,000 bytes": _zip_bomb(
                place / f"{name}.zip", method, honest=False
            )
            for name, method in methods.items()
        },
        "tar member that declares 1 TB": _tar_bomb(place / "large.tar", tarfile.REGTYPE, 10**12),
        "sparse tar member": _tar_bomb(place / "sparse.tar", tarfile.GNUTYPE_SPARSE, 0),
        "tar of long names of long names": _tar_of_names(place / "names.tar"),
        "idx that declares 4,294,967,295 pictures": _idx_bomb(place / "idx", (2**32 - 1, 28, 28), packed=False),
        "idx.gz that declares 4,294,967,295 pictures": _idx_bomb(place / "gz", (2**32 - 1, 28, 28), packed=True),
        "idx.gz of 300 MB that declares one picture": _idx_bomb(place / "gz1", (1, 28, 28), packed=True),
    }


def bombs(directory: str, names: list[str] | None) -> dict[str, Any]:
    """Read every bomb (or the ones named); by name, how it ended and how much larger the process grew."""
    bad_files_logger.disabled = True
    torch.set_num_threads(1)
    readers: dict[str, Callable[[], Any]] = {}
    for name, make in PICTURE_BOMBS.items():
        if names is None or name in names:
            data = make()
            assert len(data) < 1_200_000, f"{name}: {len(data)} bytes"
            readers[name] = lambda data=data: decode_picture(data, 3, 256)  # type: ignore[misc]
    if names is None:
        readers |= container_bombs(Path(directory))
    found = {}
    for name, read in readers.items():
        before, started = reset_peak(), time.perf_counter()
        try:
            read()
            ended = "read"
        except (BadPicture, DataError) as error:
            ended = f"refused: {str(error)[-300:]}"
        found[name] = [ended, peak_megabytes() - before, round(time.perf_counter() - started, 2)]
    return found


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in PICTURE_BOMBS if "200 MB" not in name and "tile" not in name], id="short"),
        pytest.param(None, id="long", marks=LONG),
    ],
)
def test_no_bomb_of_any_kind_takes_memory(names: list[str] | None, tmp_path: Path, tally: Tally) -> None:
    found = bombs(str(tmp_path), names) if names else in_own_process(bombs, str(tmp_path), None)
    for name, (ended, growth, seconds) in found.items():
        assert ended.startswith("refused"), f"{name}: {ended}"
        assert growth < _GROWTH_MB, f"{name}: {growth} MB more"
        assert seconds < 10, f"{name}: {seconds} s"
        tally["refused"] += 1
    tally.figures["growth_mb"] = max(growth for _, growth, _ in found.values())


def test_a_zip_entry_is_unpacked_no_further_than_it_declares(tmp_path: Path) -> None:
    """Nothing may be unpacked but the bytes that were declared, and only by a method that can stop there."""
    for name, method in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2)):
        file = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("cat/a.png", bytes(50_000_000))
        content, true = bytearray(file.read_bytes()), struct.pack("<I", 50_000_000)
        file.write_bytes(content.replace(true, struct.pack("<I", 1000)))
        before = reset_peak()
        with pytest.raises(DataError, match=r"cat/a\.png"):
            ImagesDataset(file)[0]
        assert peak_megabytes() - before < 20


def test_one_absurd_label_does_not_make_a_list_of_classes(tmp_path: Path) -> None:
    """Classes are numbered up to the largest label: a list of their names must not follow a damaged one."""
    with pytest.raises(DataError, match=r"label 2097152.*1048575"):
        ShardsDataset(str(write_tar(tmp_path / "s.tar", {"a.png": png(), "a.cls": str(2**21).encode()})))


def test_headers_in_headers_of_a_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names\.tar"):
        _tar_of_names(tmp_path / "names.tar")()


def test_the_directory_of_a_zip_may_hold_any_bytes(tmp_path: Path) -> None:
    """A name that says it is UTF-8 and is not."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("ä/a.png", png())
    content = (tmp_path / "data.zip").read_bytes()
    (tmp_path / "data.zip").write_bytes(content.replace("ä".encode(), b"\xc3\xff"))
    with pytest.raises(DataError, match="not a readable zip"):
        ImagesDataset(tmp_path / "data.zip")
