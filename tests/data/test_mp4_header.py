"""How many samples an MP4 declares: read off boxes that were made by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from acdit.data.frame_choice import BadClip
from acdit.data.mp4_header import require_credible_counts


def box(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", 8 + len(content) if length is None else length) + kind + content


def sizes(count: int, kind: bytes = b"stsz") -> bytes:
    return box(kind, struct.pack(">III", 0, 1, count))


def runs(*counts: int, kind: bytes = b"stts", entries: int | None = None) -> bytes:
    pairs = b"".join(struct.pack(">II", count, 7) for count in counts)
    return box(kind, struct.pack(">II", 0, len(counts) if entries is None else entries) + pairs)


def judged(folder: Path, *boxes: bytes, size: int = 1000) -> None:
    """Of a file of `size` bytes with these boxes in its tables, and pixels behind them."""
    data = box(b"ftyp", b"isom") + box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", b"".join(boxes))))))
    (folder / "a.mp4").write_bytes(data + box(b"mdat", b"\xff" * (size - 8 - len(data))))
    assert (folder / "a.mp4").stat().st_size == size
    require_credible_counts(folder / "a.mp4")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (sizes, "stsz"),
        (lambda count: sizes(count, b"stz2"), "stz2"),
        (runs, "stts"),
        (lambda count: runs(count, kind=b"ctts"), "ctts"),
        (lambda count: runs(count - 400, 400), "stts"),
        (lambda count: sizes(count - 400) + sizes(400), "stsz"),  # tracks are counted together
    ],
)
def test_as_many_samples_as_bytes_pass_and_one_more_is_refused(
    tmp_path: Path, make: Callable[[int], bytes], name: str
) -> None:
    judged(tmp_path, make(1000))
    with pytest.raises(BadClip, match=rf"declares 1,001 samples \({name}\) in 1,000 bytes"):
        judged(tmp_path, make(1001))


def test_counts_that_overflow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match="declares 4,294,967,296 samples"):
        judged(tmp_path, runs(2**31, 2**31))


def test_a_table_is_read_no_further_than_its_box(tmp_path: Path) -> None:
    judged(tmp_path, runs(5, entries=2**32 - 1))
    judged(tmp_path, box(b"stts", struct.pack(">IIII", 0, 2, 5, 7) + b"\xff" * 4))  # half an entry
    long = struct.pack(">I", 900) + runs(5, entries=100)[4:]  # longer than the box around it
    judged(tmp_path, long)


def test_boxes_that_lead_nowhere_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for data in (
        struct.pack(">I4sQ", 1, b"moov", 0) + bytes(100),
        struct.pack(">I4s", 4, b"moov") + bytes(100),
        b"abc",
        b"",
    ):
        path.write_bytes(data)
        require_credible_counts(path)
    deep = b""
    for _ in range(3000):
        deep = box(b"moov", deep)
    path.write_bytes(deep)
    require_credible_counts(path)
