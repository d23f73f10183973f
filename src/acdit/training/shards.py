"""Tensors that lie in several processes, row by row, and the files they come from and go to.

A shard is a contiguous range of rows (dimension 0): rank r of R holds rows r·⌈n/R⌉ … of n, as FSDP2 cuts them; the
last ranks may hold none. In a checkpoint of R shards every part is R files, and the rows of a tensor are those of its
entries put together in the files' order. Scalars are in the first file only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from acdit import storage
from acdit.errors import StorageError
from acdit.training.parallel import Parallel


def local(tensor: Tensor) -> Tensor:
    """This process's rows; the memory itself, not a copy. A plain tensor is all its own."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local().detach()


def cut_like(rows: Tensor, parameter: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut as `parameter` is, as one tensor over all processes."""
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors with all their rows, themselves where they are not cut; every process must call it, those that
    `keep` get the result."""
    kept = {}
    for name, tensor in tensors.items():
        with torch.no_grad():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = full
    return kept


def row_range(tensor: Tensor) -> tuple[int, int] | None:
    """(start, stop) of the rows that this process holds; None of a tensor that is not cut.

    Raises:
        RuntimeError: torch has cut it in another way than this module knows.
    """
    if not isinstance(tensor, DTensor):
        return None
    rank, count = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
    rows = tensor.shape[0]
    chunk = -(-rows // count)
    start, stop = min(rows, rank * chunk), min(rows, (rank + 1) * chunk)
    if local(tensor).shape[0] != stop - start:
        raise RuntimeError(f"{local(tensor).shape[0]} rows here where {start} … {stop} of {rows} were expected")
    return start, stop


def file_name(part: str, shard: int = 0, shards: int = 1) -> str:
    """A part's file in a checkpoint: `model.safetensors`, or `model-00001-of-00002.safetensors` of shards."""
    return f"{part}.safetensors" if shards == 1 else f"{part}-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write(tensors: dict[str, Tensor], file: Path, first: bool = True) -> None:
    """Write this process's rows of a part, on disk when it returns.

    Args:
        tensors: plain or cut.
        file: the file to make.
        first: of the shards; it holds the scalars.
    """
    mine = {name: local(tensor) for name, tensor in tensors.items() if first or isinstance(tensor, DTensor)}
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in mine.items()}, file)
    # The process that commits the directory may run on another machine: it can sync only what it has written itself.
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


class Part:
    """One part of a checkpoint (weights, an average, moments), read by rows, whatever number of files it lies in.

    Args:
        checkpoint: its directory.
        part: its name.
        shards: how many files it lies in.

    Raises:
        StorageError: a file is missing or cannot be read; it is named.
    """

    def __init__(self, checkpoint: Path, part: str, shards: int = 1) -> None:
        self.part = part
        self.place = checkpoint / (file_name(part) if shards == 1 else f"{part}-*-of-{shards:05d}.safetensors")
        self._files = []
        self._shapes: dict[str, list[list[int]]] = {}
        for shard in range(shards):
            file = checkpoint / file_name(part, shard, shards)
            if not file.is_file():
                raise StorageError(f"{file}", found="no such file", expected=f"the state of {part}")
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise StorageError(f"{file}", found=f"{error}", expected="a safetensors file") from None
            self._files.append(opened)
            for name in opened.keys():  # noqa: SIM118 (safetensors' handle is no mapping)
                shape = list(opened.get_slice(name).get_shape())
                # A name that an earlier shard lacks would put rows in the wrong place: keep one entry a shard.
                self._shapes.setdefault(name, [[] for _ in range(shards)])[shard] = shape

    @property
    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Empty where shards do not fit together: no tensor with rows has that shape."""
        shapes = self._shapes[name]
        if not all(shapes) or len({tuple(shape[1:]) for shape in shapes}) > 1:
            return ()
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a part that has not exactly these tensors.

        Raises:
            StorageError: the names that are missing, extra or misshaped.
        """
        wrong = sorted(set(shapes) ^ self.names) or [name for name in shapes if shapes[name] != self.shape(name)]
        if wrong:
            raise StorageError(
                f"{self.place}", found=f"missing, extra or misshaped: {', '.join(wrong)}", expected=self.part
            )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a tensor; no others are read. At least one."""
        found, offset = [], 0
        for file, shape in zip(self._files, self._shapes[name], strict=True):
            first, last = max(start, offset), min(stop, offset + shape[0])
            if first < last:
                found.append(file.get_slice(name)[first - offset : last - offset])
            offset += shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        if len(self._files) == 1 or not self._shapes[name][0]:  # one file, or a scalar
            return self._files[0].get_tensor(name)
        return torch.cat([file.get_tensor(name) for file in self._files])

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a tensor, or the rows of it that this process holds."""
        rows = row_range(target)
        if rows is None:
            target.detach().copy_(self.tensor(name))
        elif rows[0] < rows[1]:
            local(target).copy_(self.rows(name, *rows))


@contextlib.contextmanager
def atomic_directory(parallel: Parallel, path: Path, expected_bytes: int) -> Iterator[Path]:
    """`storage.atomic_directory` that all processes write into; the first one commits it when all are done.

    Args:
        parallel: the processes; all must enter.
        path: where the directory shall be, on a file system that all of them see.
        expected_bytes: what all of them are about to write.

    Raises:
        StorageError: in every process, when any could not write; `path` is as it was.
    """
    with contextlib.ExitStack() as stack:
        directory = parallel.processes.by_first(
            lambda: stack.enter_context(storage.atomic_directory(path, expected_bytes=expected_bytes))
        )
        failure: Exception | None = None
        try:
            if not directory.is_dir():
                raise StorageError(
                    f"{path}", found=f"a place that process {parallel.rank} does not see",
                    expected="one file system for all processes", fix="choose an --output that all machines share",
                )  # fmt: skip
            yield directory
        except (OSError, SafetensorError, StorageError) as error:
            failure = error
        said = parallel.processes.gather(None if failure is None else str(failure))
        if failure is not None and (parallel.main or isinstance(failure, StorageError)):
            raise failure  # in the first process storage explains it
        failed = [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]
        if failed:
            raise StorageError(
                f"{path}", found="; ".join(failed), expected="every process's part",
                fix="free some space, or choose another output directory",
            ) from failure  # fmt: skip
        commit = stack.pop_all()
        parallel.processes.by_first(commit.close)
