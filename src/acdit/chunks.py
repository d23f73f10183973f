"""Long work over many items, done in chunks: each chunk is kept once it is finished, whoever finished it.

A killed command that is started again makes only what is missing. Chunks are cut by the items' indices alone, so any
number of processes makes the same chunks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from acdit import storage
from acdit.errors import ConfigError, StorageError
from acdit.processes import Processes
from acdit.recipe import differing

logger = logging.getLogger(__name__)

_DESCRIPTION = "work.json"
_DATA = "data.safetensors"


class ChunkStore:
    """A folder of finished chunks, one committed directory each.

    Args:
        folder: its own folder; made when needed.
        description: what the items depend on, as JSON; chunks are reused only under an equal description.
        total: how many items there are. It may grow later: whole chunks are then kept.
        chunk_size: items a chunk.

    Raises:
        ConfigError: no items, or an empty chunk.
    """

    def __init__(self, folder: str | Path, description: Mapping[str, Any], total: int, chunk_size: int) -> None:
        if total < 1 or chunk_size < 1:
            raise ConfigError("chunks", found=f"{total} items, {chunk_size} a chunk", expected="at least one of each")
        self.folder = Path(folder)
        self.description: dict[str, Any] = json.loads(json.dumps(description))
        self.total, self.chunk_size = total, chunk_size

    def __len__(self) -> int:
        """How many chunks."""
        return -(-self.total // self.chunk_size)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First item, and the one behind the last."""
        return chunk * self.chunk_size, min(self.total, (chunk + 1) * self.chunk_size)

    def path(self, chunk: int) -> Path:
        """The chunk's directory; its name tells its items."""
        start, stop = self.bounds(chunk)
        return self.folder / f"items-{start:08d}-{stop:08d}"

    def save(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """Commit a finished chunk.

        Raises:
            StorageError: there is no room for it; finished chunks are left as they are.
        """
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        needed = sum(value.nbytes for value in whole.values())
        with storage.atomic_directory(self.path(chunk), expected_bytes=needed) as directory:
            save_file(whole, directory / _DATA)

    def load(self, chunk: int) -> dict[str, Tensor]:
        """A finished chunk."""
        return load_file(self.path(chunk) / _DATA)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """All chunks in the order of their items, one in memory at a time."""
        return (self.load(chunk) for chunk in range(len(self)))

    def prepare(self) -> list[int]:
        """Make or check the folder, remove what is damaged; to be called by the holder of the lock.

        Returns:
            The chunks still to be made.

        Raises:
            StorageError: the folder holds chunks of something else; the fields that differ are named.
        """
        self._require_same_description()
        storage.clean_leftovers(self.folder)
        return [chunk for chunk in range(len(self)) if not self._is_whole(chunk)]

    def _is_whole(self, chunk: int) -> bool:
        path = self.path(chunk)
        if not path.exists():
            return False
        try:
            storage.verify(path)
        except StorageError as error:
            logger.warning("%s is damaged and made again: %s", path, error)
            shutil.rmtree(path)
            return False
        return True

    def _require_same_description(self) -> None:
        file = self.folder / _DESCRIPTION
        if not file.exists():
            storage.write_json_atomic(file, self.description)
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{file}", found=f"unreadable ({error})", expected="what the chunks depend on") from None
        if held == self.description:
            return
        changed = differing(held, self.description) if isinstance(held, dict) else {}
        listed = "; ".join(f"{key}: {old!s:.60} there, {new!s:.60} now" for key, (old, new) in changed.items())
        raise StorageError(
            f"{self.folder}", found=f"parts made with other settings ({listed})",
            expected="the same settings", fix="choose another --output, or remove that folder",
        )  # fmt: skip


def make_missing(
    store: ChunkStore,
    make: Callable[[int, int], Mapping[str, Tensor]],
    processes: Processes | None = None,
    *,
    what: str = "items",
    progress: bool = True,
) -> None:
    """Make every chunk that is not there yet, each process its share; returns once all of them are there.

    Args:
        store: where they are kept.
        make: (start, stop) → the tensors of these items.
        processes: this process among its peers.
        what: for the progress bar.
        progress: whether the first process draws a bar.

    Raises:
        StorageError: another command is at work in the folder, or it holds something else.
        PeerLostError: another process is gone; what is finished is kept.
    """
    processes = processes or Processes()
    with contextlib.ExitStack() as held:

        def prepare() -> list[int]:
            held.enter_context(storage.RunLock(store.folder))
            return store.prepare()

        missing = processes.by_first(prepare)
        ours = missing[processes.rank :: processes.size]
        kept = len(store) - len(missing)
        if kept and missing and processes.is_first:
            logger.info("%s: %d of %d chunks are there already", what, kept, len(store))
        items = sum(stop - start for start, stop in map(store.bounds, ours))
        quiet = not (progress and processes.is_first and ours)
        with tqdm(total=items, desc=what, unit="img", disable=quiet, dynamic_ncols=True) as bar:
            for chunk in ours:
                start, stop = store.bounds(chunk)
                store.save(chunk, make(start, stop))
                bar.update(stop - start)
        processes.wait_for_all()
