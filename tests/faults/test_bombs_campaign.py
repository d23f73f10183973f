"""Row 23 of the reliability bar at length: what declares or unpacks to more than there is room for."""

from __future__ import annotations

import gzip
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit.data import IdxDataset, ImagesDataset, ShardsDataset
from acdit.data.bad_files import logger as bad_files_logger
from acdit.data.picture import BadPicture, decode_picture
from acdit.errors import DataError
from tests.data.pictures import png, write_tar
from tests.faults.campaigns import LONG, in_own_process, peak_megabytes, reset_peak
from tests.faults.conftest import Tally
from tests.faults.mutations import PICTURE_BOMBS

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
