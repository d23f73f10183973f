"""The service behind the page: a bounded queue, one worker, batches of what fits together, and nothing left behind."""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from acdit.app import drawing, writing
from acdit.app.events import Busy, Cancelled, Failed, Ticket, Waiting
from acdit.app.models import ServedModel
from acdit.app.requests import Limits, Request, SampleRequest, TextRequest, checked_text
from acdit.cache import KVCache
from acdit.errors import AcditError, ConfigError

_log = logging.getLogger(__name__)


class Service:
    """Takes requests, one batch at a time; a context that closes it.

    Args:
        models: what is served; names must differ.
        limits: see `Limits`.
    """

    def __init__(self, models: Sequence[ServedModel], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.models = {model.name: model for model in models}
        if len(self.models) != len(models):
            raise ConfigError("models", found=str([model.name for model in models]), expected="names that differ")
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._closed = False
        self.last_worked = time.monotonic()
        """When a request last came, or ended (`time.monotonic`)."""
        self.when_idle: Callable[[], None] = lambda: None
        """Called once the server has had no request for a while."""
        self._worker = threading.Thread(target=self._work, name="acdit-app", daemon=True)
        self._worker.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def live_caches(self) -> int:
        """Caches of requests that are still in memory: 0 when nothing runs."""
        return len(self._caches)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch at work."""
        return len(self._running)

    def idle_seconds(self, now: float) -> float:
        """Time without any request, waiting or at work, at the `now` of `time.monotonic`."""
        return 0.0 if self.running or self.waiting else now - self.last_worked

    def checked(self, request: Request) -> Request:
        """The request with every field bounded and every default filled in; nothing is allocated.

        Raises:
            ConfigError: an unknown model or a field out of its bounds.
        """
        served = self.models.get(request.model) if isinstance(request.model, str) else None
        if served is None:
            raise ConfigError("model", found=f"{request.model!r:.60}", expected=f"one of {', '.join(self.models)}")
        if isinstance(request, TextRequest):
            if served.kind != "text":
                raise ConfigError("model", found=f"one of {served.kind}", expected="one of text")
            checked = checked_text(request, self.limits)
            writing.prompt_ids(served, checked)
            return checked
        if served.kind == "text":
            raise ConfigError("model", found="one of text", expected="one of pictures or clips")
        return served.checked(request, self.limits)

    def submit(self, request: Request) -> Ticket:
        """Check a request and put it into the queue.

        Raises:
            ConfigError: see `checked`.
            Busy: the queue is full, or the service is closed.
        """
        ticket = Ticket(self.checked(request), self.limits.patience)
        with self._changed:
            self._forget_given_up()
            if self._closed or len(self._waiting) >= self.limits.waiting:
                raise Busy(len(self._waiting))
            self._waiting.append(ticket)
            self.last_worked = time.monotonic()
            ticket.put(Waiting(len(self._waiting) - 1 + len(self._running)))
            self._changed.notify_all()
        return ticket

    def switch(self, ticket: Ticket, label: Any) -> int | None:
        """Change the class of a running request from its next block on; returns it.

        Raises:
            ConfigError: a class the model does not have, or a request of text.
        """
        served = self.models[ticket.request.model]
        if served.kind == "text":
            raise ConfigError("label", found="a request of text", expected="one of pictures or clips")
        checked = served.checked_label(label)
        ticket.switch(checked)
        return checked

    def cancel(self, ticket: Ticket, why: str = "cancelled") -> None:
        """Stop a request: out of the queue now, or at the next step."""
        ticket.cancel(why)
        with self._changed:
            self._forget_given_up()

    def close(self, timeout: float = 30.0) -> None:
        """Take nothing more, cancel everything, and wait for the worker.

        Args:
            timeout: seconds; a step that takes longer is left to end by itself.
        """
        with self._changed:
            self._closed = True
            for ticket in [*self._waiting, *self._running]:
                ticket.cancel("the server shuts down")
            self._forget_given_up()
            self._changed.notify_all()
        self._worker.join(timeout)

    # --- the worker -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                self._forget_given_up()
                self._running = self._next_batch()
                for ahead, ticket in enumerate(self._waiting):
                    ticket.put(Waiting(ahead + len(self._running)))
            if self._running:
                self._run(self._running)
                self.last_worked = time.monotonic()
            self._running = []

    def _forget_given_up(self) -> None:
        for ticket in [one for one in self._waiting if one.cancelled]:
            self._waiting.remove(ticket)
            ticket.put(Cancelled(ticket.cancelled or ""))

    def _next_batch(self) -> list[Ticket]:
        """The oldest request, and those that can be denoised with it."""
        if not self._waiting:
            return []
        batch = [self._waiting.pop(0)]
        key, samples = batch_key(batch[0].request), batch[0].request.samples
        for ticket in list(self._waiting) if key is not None else []:
            if batch_key(ticket.request) == key and samples + ticket.request.samples <= self.limits.batch:
                self._waiting.remove(ticket)
                batch.append(ticket)
                samples += ticket.request.samples
        return batch

    def _run(self, batch: list[Ticket]) -> None:
        served = self.models[batch[0].request.model]
        try:
            if served.kind == "text":
                writing.write(served, batch[0], self._caches.add)
            else:
                drawing.draw(served, batch, self._caches.add)
        except (drawing.Stopped, writing.Stopped):
            pass
        except AcditError as error:
            _tell(batch, str(error))
        except Exception as error:  # the worker must outlive whatever a model does
            _log.error("a request failed\n%s", traceback.format_exc())  # as text: a traceback would hold the cache
            _tell(batch, f"{type(error).__name__} (this looks like a bug; the server's log shows where)")


def batch_key(request: Request) -> tuple[Any, ...] | None:
    """What requests must share to be one batch; None: it is alone (text, or with an upload)."""
    if not isinstance(request, SampleRequest) or request.given is not None:
        return None
    return request.model, request.steps, request.guidance, request.solver, request.block, request.blocks


def _tell(batch: Sequence[Ticket], message: str) -> None:
    for ticket in batch:
        ticket.put(Failed(message))
