"""acdit encode of tars and tables: what is promised for class folders holds for the same pictures in other forms."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from acdit import storage
from acdit.cli import main
from acdit.codecs import VAECodec
from acdit.data import HFDataset, LatentsDataset, ShardsDataset
from acdit.data.labelled import LabelledPictures
from acdit.data.latents import LatentsManifest
from acdit.encoding import encode_dataset
from acdit.encoding_plan import EncodeSettings
from acdit.errors import ConfigError, DataError, NonFiniteError
from tests import autoencoders
from tests.data.pictures import png, write_tar
from tests.test_encoding import content

datasets = pytest.importorskip("datasets", reason="the library `datasets` is in the extra train")

NAMES = ["class-0", "class-1"]
Pictures = list[tuple[str, bytes]]


def pictures(folder: Path) -> Pictures:
    """(class/name.png, bytes) in the order in which folders are read."""
    return [(str(file.relative_to(folder)), file.read_bytes()) for file in sorted(folder.rglob("*.png"))]


def tars(folder: Path, files: Pictures) -> str:
    """Two shards, cut in the middle of a class; labels are names."""
    folder.mkdir(parents=True)
    for number, part in enumerate((files[:3], files[3:])):
        members: dict[str, bytes] = {}
        for name, data in part:
            members |= {name: data, name.replace(".png", ".txt"): name.partition("/")[0].encode()}
        write_tar(folder / f"s-{number}.tar", members)
    return str(folder / "s-{0..1}.tar")


def table(folder: Path, files: Pictures) -> str:
    """Two parquet files with classes that know their names."""
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    cells = [{"bytes": data, "path": None} for _, data in files]
    labels = [NAMES.index(name.partition("/")[0]) for name, _ in files]
    made = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    for number in range(2):
        made.shard(2, number, contiguous=True).to_parquet(str(folder / f"{number}.parquet"))
    return str(folder)


WRITERS: dict[str, Callable[[Path, Pictures], str]] = {"webdataset": tars, "hf": table}
READERS: dict[str, Callable[..., LabelledPictures]] = {"webdataset": ShardsDataset, "hf": HFDataset}
each_kind = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture(autouse=True, scope="module")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library's caches in the tests' own folder, and no network."""
    cache = str(tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_CACHE_HOME", cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures as folders, tars and a table; an autoencoder."""
    base = tmp_path_factory.mktemp("inputs")
    folder = autoencoders.picture_folder(base / "images")
    autoencoders.kl().save_pretrained(base / "vae")
    for kind, write in WRITERS.items():
        write(base / kind, pictures(folder))
    return base


def root(base: Path, kind: str) -> str:
    return str(base / kind / "s-{0..1}.tar") if kind == "webdataset" else str(base / kind)


def encode(base: Path, kind: str, output: Path, workers: int = 1, **options: Any) -> LatentsManifest:
    given = {"data": root(base, kind), "vae": str(base / "vae"), "kind": kind, "size": 16, "flips": True}
    settings = EncodeSettings(**{**given, "batch_size": 2, "shard_size": 3, **options})
    return encode_dataset(settings, output, workers=workers, device="cpu", progress=False)


def test_the_same_pictures_give_the_same_latents_in_every_form(base: Path, tmp_path: Path) -> None:
    """To the byte, and so does what training reads."""
    folders = encode(base, "images", tmp_path / "images")
    expected = LatentsDataset(tmp_path / "images", flip=True)
    assert (folders.class_names, expected.labels) == (NAMES, [0] * 5 + [1] * 5)
    for kind in WRITERS:
        manifest = encode(base, kind, tmp_path / kind)
        assert (manifest.class_names, manifest.samples) == (NAMES, 10)
        assert manifest.shards == folders.shards  # their sha256
        assert manifest.files_sha256 != folders.files_sha256
        found = LatentsDataset(tmp_path / kind, flip=True)
        assert found.labels == expected.labels
        assert all(torch.equal(found[index][0], expected[index][0]) for index in range(10))


@pytest.mark.parametrize("kind", ["webdataset", pytest.param("hf", marks=pytest.mark.campaign)])  # half a minute each
def test_after_a_sigkill_of_two_workers_another_process_ends_the_same(base: Path, tmp_path: Path, kind: str) -> None:
    """The data travel to workers, and are known again by a process whose library has its cache elsewhere."""
    encode(base, kind, tmp_path / "whole", shard_size=1, batch_size=1)
    output = tmp_path / "killed"
    command = [
        sys.executable, "-m", "acdit.cli", "encode", root(base, kind), "--kind", kind, "--vae", str(base / "vae"),
        "--size", "16", "--flips", "--batch-size", "1", "--shard-size", "1", "--workers", "2", "--device", "cpu",
        "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list(output.glob("shard-*.json")):
        time.sleep(0.005)
    child.send_signal(signal.SIGSTOP)  # or it might end while its workers are asked for
    workers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not (output / storage.MANIFEST).exists()
    kept = {name: data for name, data in content(output).items() if name.endswith(".json")}
    encode(base, kind, output, shard_size=1, batch_size=1)
    assert content(output) == content(tmp_path / "whole")
    assert kept.items() <= content(output).items()
    assert len(kept) >= 2  # the plan and a shard


# --- what identifies the samples ---------------------------------------------------------------------------------


def _other_label(files: Pictures) -> Pictures:
    return [*files[:-1], ("class-0/9.png", files[-1][1])]


def _swapped(files: Pictures) -> Pictures:
    return [files[1], files[0], *files[2:]]


def _fewer(files: Pictures) -> Pictures:
    return files[:-1]


@each_kind
@pytest.mark.parametrize("change", [_other_label, _swapped, _fewer])
def test_other_data_are_not_gone_on_with(base: Path, tmp_path: Path, kind: str, change: Any) -> None:
    files = pictures(base / "images")
    data = WRITERS[kind](tmp_path / "data", files)
    encode(base, kind, tmp_path / "out", data=data)
    shutil.rmtree(tmp_path / "data")
    WRITERS[kind](tmp_path / "data", change(files))
    with pytest.raises(ConfigError, match="files_sha256 was"):
        encode(base, kind, tmp_path / "out", data=data)


@each_kind
def test_data_that_were_copied_elsewhere_are_gone_on_with(base: Path, tmp_path: Path, kind: str) -> None:
    """As onto the disk of the next machine: other paths, other times."""
    encode(base, kind, tmp_path / "out")
    (tmp_path / "out" / "shard-00001.json").unlink()
    expected = content(tmp_path / "out")
    shutil.copytree(base / kind, tmp_path / kind, copy_function=shutil.copyfile)
    encode(base, kind, tmp_path / "out", data=root(tmp_path, kind))
    assert content(tmp_path / "out").items() >= expected.items()


def test_a_picture_of_as_many_bytes_makes_another_table(tmp_path: Path) -> None:
    one, two = png(5), png(6)
    assert len(one) == len(two)
    first, second = (
        HFDataset(table(tmp_path / name, [("class-0/0.png", one), ("class-0/1.png", data)]))
        for name, data in (("a", one), ("b", two))
    )
    assert list(first.listing()) != list(second.listing())


def test_tables_of_paths_are_known_by_them(base: Path, tmp_path: Path) -> None:
    """A folder of pictures as `datasets` reads it: cells have a path and no bytes."""
    shutil.copytree(base / "images", tmp_path / "copy")
    expected = [(name, NAMES.index(name.partition("/")[0])) for name, _ in pictures(base / "images")]
    for folder in (base / "images", tmp_path / "copy"):
        assert list(HFDataset(str(folder)).listing()) == expected


def test_an_empty_cell_is_listed(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    cells = [None, {"bytes": png(1), "path": None}]
    made = datasets.Dataset.from_dict({"image": cells, "label": [0, 0]}, features=features)
    made.save_to_disk(str(tmp_path / "data"))
    assert [len(identity) for identity, _ in HFDataset(str(tmp_path / "data")).listing()] == [0, 64]


# --- bad pictures, wrong labels, refusals ------------------------------------------------------------------------


@each_kind
def test_bad_pictures_are_counted_over_all_shards_and_named(base: Path, tmp_path: Path, kind: str) -> None:
    files = [(name, b"no" if index in (1, 7) else data) for index, (name, data) in enumerate(pictures(base / "images"))]
    data = WRITERS[kind](tmp_path / "data", files)
    with pytest.raises(DataError, match=r"one of 2.*at most 1"):
        encode(base, kind, tmp_path / "out", data=data, max_bad_files=1)
    manifest = encode(base, kind, tmp_path / "out", data=data, max_bad_files=2)
    ends = {"webdataset": ["s-0.tar:class-0/1.png", "s-1.tar:class-1/2.png"], "hf": ["row 1", "row 7"]}[kind]
    assert all(name.endswith(end) for name, end in zip(sorted(manifest.bad_files), ends, strict=True))
    latents = LatentsDataset(tmp_path / "out")
    torch.testing.assert_close(latents[1][0], latents[2][0], rtol=1e-2, atol=1e-2)  # the next good one of its class


@each_kind
def test_nan_latents_name_their_picture(base: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pictures(base / "images")
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    files[7] = (files[7][0], (tmp_path / "black.png").read_bytes())
    moments = VAECodec.moments

    def poisoned(self: VAECodec, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = moments(self, pixels)
        mean[pixels.flatten(1).max(1).values == 0] = float("nan")
        return mean, std

    monkeypatch.setattr(VAECodec, "moments", poisoned)
    named = {"webdataset": r"s-1\.tar:class-1/2\.png", "hf": "row 7"}[kind]
    with pytest.raises(NonFiniteError, match=rf"{named}; found NaN or infinite latents at index 7"):
        encode(base, kind, tmp_path / "out", data=WRITERS[kind](tmp_path / "data", files))
    assert len(list((tmp_path / "out").glob("shard-*.json"))) == 2  # those before it are kept


@pytest.mark.parametrize("kind", ["images", *WRITERS])
def test_a_class_list_orders_and_names_the_classes(base: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "classes.json").write_text('{"0": ["class-1", "dog"], "1": ["class-0", "cat"]}')
    manifest = encode(base, kind, tmp_path / "out", classes=str(tmp_path / "classes.json"))
    assert manifest.class_names == ["dog", "cat"]
    labels = LatentsDataset(tmp_path / "out").labels
    assert sorted(labels) == [0] * 5 + [1] * 5
    assert labels[0] == (0 if kind == "images" else 1)  # folders are read class by class, others in their own order


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "digits"}, r"--kind; found 'digits'; expected one of .*'hf', 'clips'"),
        ({"kind": "images", "label_column": "class"}, r"data\.label_column; found 'class'.*webdataset or hf"),
        ({"kind": "images", "image_column": "img"}, r"data\.image_column; found 'img'.*data\.kind=hf"),
        ({"kind": "webdataset", "image_column": "img"}, r"data\.image_column; found 'img'.*data\.kind=hf"),
    ],
)
def test_a_setting_without_use_is_refused_before_anything_is_done(
    base: Path, tmp_path: Path, options: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        encode(base, **{"output": tmp_path / "never", **options})
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("kind", "more", "code", "named"),
    [
        ("images", ["--label-column", "class"], 2, r"--label-column; found 'class'.*only --kind=webdataset or hf"),
        ("hf", ["--label-column", "class"], 3, r"--label-column; found no column 'class'.*set --label-column"),
        ("hf", ["--split", "val"], 3, r"DATA \S+, split 'val'"),
        ("hf", ["--classes", "short.txt"], 3, r"class-1.*short\.txt.*correct --classes"),
        ("images", ["--kind", "webdataset"], 3, r"DATA \S+; found a directory without \.tar files"),
    ],
)
def test_the_command_names_its_own_options(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str,
    more: list[str], code: int, named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("class-0\n")
    arguments = ["encode", root(base, kind), "--kind", kind, "--vae", str(base / "vae"), "--output", "out", *more]
    assert main(arguments) == code
    message = capsys.readouterr().err
    assert re.search(named, message), message
    assert "data." not in message
