"""Which checkpoints a run has: checkpoint-N directories, found, set aside and pruned."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from acdit import storage
from acdit.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")


def all_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of everything called checkpoint-N, oldest first; of a run that is not there, nothing."""
    named = [(_CHECKPOINT.fullmatch(place.name), place) for place in Path(run).glob("checkpoint-*")]
    return sorted((int(name[1]), place) for name, place in named if name)


def committed_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """Those with a commit marker; `storage.verify` says whether one is whole."""
    return [(step, path) for step, path in all_checkpoints(run) if storage.is_committed(path)]


def set_aside_later(run: str | Path, step: int) -> list[Path]:
    """Rename what is called checkpoint-M with M > `step`. To be called by the holder of the run's lock.

    A run that goes on from `step` writes a history of its own: later checkpoints of another one would count as newer
    than its own, be resumed from, and push its own out of the number that is kept.

    Returns:
        The new places, abandoned-checkpoint-M-…; nothing is removed.
    """
    moved = [storage.move_aside(path, "abandoned") for later, path in all_checkpoints(run) if later > step]
    if moved:
        names = ", ".join(place.name for place in moved)
        logger.warning("the run goes on from step %d; later checkpoints are set aside as %s", step, names)
    return moved


def prune(run: str | Path, keep: int) -> list[Path]:
    """Remove the checkpoints that are older than the newest `keep` whole ones.

    Each of those is verified now, right before anything goes: a damaged one does not count, and stays where it is
    until `keep` whole ones are newer than it.

    Returns:
        What was removed.

    Raises:
        ConfigError: `keep` is less than 1.
    """
    if keep < 1:
        raise ConfigError("keep", found=str(keep), expected="at least one checkpoint")
    checkpoints = [path for _, path in committed_checkpoints(run)]
    whole = 0
    while whole < keep and len(checkpoints) + whole > keep:
        path = checkpoints.pop()
        try:
            storage.verify(path)
        except StorageError as error:
            logger.warning("%s is damaged and does not count among the checkpoints kept: %s", path.name, error)
        else:
            whole += 1
    if whole < keep:
        return []
    for path in checkpoints:
        storage.remove_directory(path)
    return checkpoints
