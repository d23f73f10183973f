"""The processes of one command under torchrun: who this one is, and what they tell each other.

Each process does its share of the work alone; they speak only at its beginning and end, over gloo, so that the same
code runs on any device and without one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from acdit.errors import AcditError, PeerLostError

T = TypeVar("T")

# A process that is done waits for the slowest one. A dead one is noticed at once, because its connection closes.
_PATIENCE = timedelta(hours=24)


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
        """The first process does it; all get its result (anything that pickles), or raise its error.

        Raises:
            AcditError: what the work of the first process raised.
            PeerLostError: a process is gone.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except AcditError as error:
                told[1] = error
        with _peers_needed():
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def wait_for_all(self) -> None:
        """Return once every process has come here.

        Raises:
            PeerLostError: one never will.
        """
        if self.size > 1:
            with _peers_needed():
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
    """Join the processes that torchrun started (its environment variables say which); outside torchrun, one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    ours = not dist.is_initialized()
    if ours:
        with _peers_needed():
            dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's connection errors
        raise PeerLostError(
            "another process of this command", found=f"it is gone ({str(error).splitlines()[0][:120]})",
            fix="look at its message; start the command again: finished parts are kept",
        ) from None  # fmt: skip
