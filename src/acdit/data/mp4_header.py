"""How many samples an MP4 or MOV declares, read off its boxes.

FFmpeg makes a table entry for every declared sample as soon as it opens a file, before anybody can ask how many there
are: 3 kilobytes that declare 60 million took 4 GB and half a minute. So the counts are looked at first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from acdit.data.frame_choice import BadClip

# FFmpeg looks into `free` and `hoov` too, where some programs left a `moov`.
_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"free", b"hoov")
_COUNT_AT = {b"stsz": 8, b"stz2": 8, b"trun": 4}
_RUNS = (b"stts", b"ctts")


def require_credible_counts(path: Path) -> None:
    """Refuse a file that declares more samples than it has bytes; what is no MP4 passes.

    Raises:
        BadClip: it does, or its tables are compressed.
    """
    size = path.stat().st_size
    declared: Counter[bytes] = Counter()
    with path.open("rb") as file:
        for kind, start, stop in _boxes(file, 0, size):
            if kind == b"cmov":
                raise BadClip("compressed tables (cmov): how many samples they declare cannot be told")
            file.seek(start)
            if kind in _COUNT_AT:
                declared[kind] += int.from_bytes(file.read(16)[_COUNT_AT[kind] :][:4], "big")
            elif kind in _RUNS:
                entries = int.from_bytes(file.read(8)[4:], "big")
                table = file.read(min(8 * entries, stop - file.tell()))
                pairs = np.frombuffer(table[: len(table) // 8 * 8], ">u4").reshape(-1, 2)
                declared[kind] += int(pairs[:, 0].sum(dtype=np.uint64))
            if declared[kind] > size:
                raise BadClip(f"the header declares {declared[kind]:,} samples ({kind.decode()}) in {size:,} bytes")


def _boxes(file: BinaryIO, start: int, stop: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, end) of the content of every box between two places, parents before their children."""
    while start + 8 <= stop:
        file.seek(start)
        head = file.read(16)
        length, kind, content = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, content = int.from_bytes(head[8:16], "big"), 16
        elif length == 0:  # to the end
            length = stop - start
        if length < content:
            return
        end = min(start + length, stop)
        yield kind, start + content, end
        if kind in _PARENTS and depth < 8:
            yield from _boxes(file, start + content, end, depth + 1)
        start += length
