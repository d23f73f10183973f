"""Tasks over worker processes that end with their parent, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any, Protocol

import torch

from acdit.errors import PeerLostError

Progress = Callable[[int], None]
_POLL_SECONDS = 0.2


class Task(Protocol):
    """Work that travels to a worker."""

    def prepare(self, worker: int) -> None:
        """Called once in every worker, with its number."""

    def __call__(self, item: int, progress: Progress) -> Any:
        """Do one item; call `progress` with how many units are done since the last call."""


class _Stopped(Exception):
    """Another task failed: what this worker is at is not wanted any more."""


def run_tasks(
    task: Task, items: Sequence[int], *, workers: int, threads: int, on_progress: Progress
) -> Generator[Any, None, None]:
    """Do all items; yield each result as it comes.

    When one fails (or the caller stops asking) the others stop at their next call of `progress`, and the error is
    raised. With one worker, or one item, all is done in this process.

    Args:
        task: what to do.
        items: what it is called with.
        workers: processes.
        threads: of torch in each.
        on_progress: called in this process with units done.

    Raises:
        PeerLostError: a worker was killed.
    """
    workers = min(workers, len(items))
    if workers == 0:
        return
    if workers == 1:
        with _torch_threads(threads):
            task.prepare(0)
            for item in items:
                yield task(item, on_progress)
        return
    context = multiprocessing.get_context("spawn")  # forked children of a process with threads may hang
    units, stop, number = context.Value("q", 0), context.Value("b", 0), context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, threads, units, stop, number))
    reported = 0
    try:
        pending: set[Future[Any]] = {pool.submit(_do, item) for item in items}
        while pending:
            finished, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            if (now := units.value) > reported:
                on_progress(now - reported)
                reported = now
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise PeerLostError(
            "worker process", found="one that was killed, or ran out of memory", expected="all to the end",
            fix="give the command again: it goes on; use fewer --workers or a smaller --batch-size if memory was short",
        ) from None  # fmt: skip
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_worker: dict[str, Any] = {}  # of a worker process: what `_start_worker` was given


def _start_worker(task: Task, threads: int, units: Any, stop: Any, number: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and tells us through `stop`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with number.get_lock():
        mine = number.value
        number.value += 1
    _worker.update(task=task, units=units, stop=stop, number=mine, prepared=False)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, and they would wait for ever on a queue of their own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)


def _do(item: int) -> Any:
    if not _worker["prepared"]:  # not in the initializer: an error there would only say that the pool is broken
        _worker["task"].prepare(_worker["number"])
        _worker["prepared"] = True
    return _worker["task"](item, _advance)


def _advance(count: int) -> None:
    if _worker["stop"].value:
        raise _Stopped
    with _worker["units"].get_lock():
        _worker["units"].value += count
