"""How many bad files a run has met, whoever met them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from acdit.errors import DataError

logger = logging.getLogger(__name__)


class BadFiles:
    """Bad files by name, each counted once; one more than the limit is an error.

    Every reader of files keeps such a count: data sets one of what they met themselves (a loader's worker has a copy of
    its own), and the run one of what all its workers and processes together reported.

    Args:
        limit: how many files may be bad (data.max_bad_files).
        known: files met before, with their reasons.
        what: they hold, for messages.
    """

    def __init__(self, limit: int, known: Mapping[str, str] | None = None, what: str = "picture") -> None:
        self.limit, self.what = limit, what
        self.reasons: dict[str, str] = dict(known or {})
        """Name → reason, in the order they were met."""

    def __len__(self) -> int:
        return len(self.reasons)

    def __contains__(self, name: object) -> bool:
        return name in self.reasons

    def add(self, name: str, reason: str) -> None:
        """Count a file.

        Raises:
            DataError: it is one too many.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if len(self.reasons) > self.limit:
            raise DataError(
                name,
                found=f"a bad {self.what} ({reason}), number {len(self.reasons)} of this run",
                expected=f"at most {self.limit} bad files (data.max_bad_files)",
                fix="repair or remove the file, or raise data.max_bad_files to skip some",
            )
        logger.warning("skipped bad %s %s (%s), %d so far", self.what, name, reason, len(self.reasons))

    def since(self, count: int) -> dict[str, str]:
        """What was met after the first `count` files."""
        return dict(list(self.reasons.items())[count:])
