"""What a request hears, and the line it is told on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acdit.app.requests import Request
from acdit.errors import AcditError


@dataclass(frozen=True)
class Waiting:
    """In the queue."""

    ahead: int
    """Requests before this one."""


@dataclass(frozen=True)
class Picture:
    """Pictures or clips while they are made."""

    frames: Tensor = field(repr=False)
    """uint8 (B, C, T, H, W): of clips the step of time at work, of pictures T = 1."""
    block: int
    """The block that is denoised, or, if `finished`, that has just been."""
    finished: bool
    step: int
    """Steps of the block that are done."""
    steps: int
    labels: tuple[int | None, ...]
    """Of every block so far."""
    done: int
    """Steps of the whole request that are done."""
    total: int
    seconds_left: float | None
    """None before it can be told."""


@dataclass(frozen=True)
class Text:
    """Texts while they are written."""

    texts: tuple[str, ...]
    """Of every sample, what is finished."""
    current: tuple[str, ...]
    """The block at work, "▒" where a token is masked."""
    block: int
    finished: bool
    step: int
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class Done:
    """The whole result; the last event."""

    frames: Tensor | None = field(repr=False)
    """uint8 (B, C, T, H, W)."""
    texts: tuple[str, ...]
    labels: tuple[int | None, ...]
    """Of every block."""
    settings: dict[str, Any]
    seconds: float
    batch: int
    """Samples that were denoised together."""


@dataclass(frozen=True)
class Cancelled:
    """Given up; the last event."""

    why: str


@dataclass(frozen=True)
class Failed:
    """An error; the last event."""

    message: str


Event = Waiting | Picture | Text | Done | Cancelled | Failed
LAST = (Done, Cancelled, Failed)


class Busy(AcditError):
    """The queue is full."""

    def __init__(self, waiting: int) -> None:
        super().__init__(
            "busy", found=f"{waiting} requests in the queue", expected=f"fewer than {waiting}", fix="try again soon"
        )


class Ticket:
    """One accepted request: its events come out here, and it can be cancelled or switched.

    A listener that falls behind misses previews, never finished blocks: memory does not grow with it.
    """

    def __init__(self, request: Request, patience: float) -> None:
        self.request = request
        self._patience = patience
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._cancelled: str | None = None
        self._ended = False
        self._heard = time.monotonic()
        self._label: int | None = getattr(request, "label", None)

    def put(self, event: Event) -> None:
        """Tell the listener; after a last event nothing more."""
        with self._changed:
            if self._ended:
                return
            if self._events and _passes(self._events[-1]):
                self._events.pop()
            self._events.append(event)
            self._ended = isinstance(event, LAST)
            self._changed.notify_all()

    def poll(self) -> Event | None:
        """The next event, or None where there is none yet; asking shows that somebody listens."""
        with self._changed:
            self._heard = time.monotonic()
            return self._events.popleft() if self._events else None

    def events(self, timeout: float = 60.0) -> Iterator[Event]:
        """All events up to the last; left early, the request is cancelled.

        Args:
            timeout: seconds without an event after which it is cancelled.
        """
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._events), timeout)
                event = self.poll()
                if event is None:
                    return
                yield event
                if isinstance(event, LAST):
                    return
        finally:
            self.cancel("nobody listens")

    def cancel(self, why: str = "cancelled") -> None:
        """Ask to stop: at the next step at the latest. It may be called at any time, and again."""
        with self._changed:
            self._cancelled = self._cancelled or why

    @property
    def cancelled(self) -> str | None:
        """Why it is to stop; None: it is not."""
        if self._cancelled is None and not self._ended and time.monotonic() - self._heard > self._patience:
            self._cancelled = "nobody listens"
        return self._cancelled

    @property
    def ended(self) -> bool:
        """Whether the last event has been told."""
        return self._ended

    @property
    def label(self) -> int | None:
        """The class of the next block."""
        return self._label

    def switch(self, label: int | None) -> None:
        """Change the class from the next block on; `Service.switch` checks it."""
        self._label = label


def _passes(event: Event) -> bool:
    """Whether an event is out of date once the next one is there."""
    return isinstance(event, Waiting) or (isinstance(event, Picture | Text) and not event.finished)
