"""The processes of one command: who this one is, and what they tell each other.

What is told here is small (flags, numbers, errors) and goes over gloo, so that the same code runs on any device and
without one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from acdit.errors import AcditError, PeerLostError, StorageError, first_line

T = TypeVar("T")

# A process that is done waits for the slowest one. A dead one is noticed at once, because its connection closes.
_PATIENCE = timedelta(hours=24)
# What torch's backends write when another process is gone: gloo and the stores raise plain RuntimeErrors.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|timed out|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Processes:
    """This process among its peers; the default is a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def by_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process only; all get its result, or raise its error and end with its exit code.

        Args:
            work: returns a value that can be pickled.

        Raises:
            AcditError, OSError: what `work` raised; in the other processes an `AcditError` that says the same.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                told[0] = work()
            except (AcditError, OSError) as error:
                failure = error
                told[1] = (type(error) if isinstance(error, AcditError) else StorageError)(f"{error}")
        dist.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise told[1]
        return told[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag if self.size == 1 else self._sum(float(flag)) > 0

    def mean(self, value: float) -> float:
        """The mean of the processes' values."""
        return value if self.size == 1 else self._sum(value) / self.size

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            dist.barrier()

    def device(self, asked: str | None = None) -> torch.device:
        """The asked device, or this process's own accelerator, or the CPU."""
        if asked is not None:
            return torch.device(asked)
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment variables say which); outside torchrun, one alone.

    Raises:
        PeerLostError: another process is gone, now or while the block runs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    ours = not dist.is_initialized()
    with peers_needed(
        "all of them to the end", "look at its message; start the command again: finished parts are kept"
    ):
        if ours:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Processes(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
        finally:
            if ours:
                leave()


def leave() -> None:
    """Leave the group, if there is one: a backend's thread that still runs when the interpreter ends makes the process
    abort, all work done."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def peers_needed(expected: str, fix: str) -> Iterator[None]:
    """Inside, a broken connection to another process becomes a `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise PeerLostError(
            "another process of this run", found=f"no answer ({first_line(error)})", expected=expected, fix=fix
        ) from error
