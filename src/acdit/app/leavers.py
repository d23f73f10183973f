"""What gradio's queue keeps of requests that are over is forgotten, so that a page that stays open does not grow.

gradio holds the messages of up to 2,000 sessions, read or not, and for ever the ids of the events of those who left;
every call of the API is a session of its own.
"""

from __future__ import annotations

from typing import Any

_INSIDE = ("pending_messages_per_session", "pending_event_ids_session", "clean_events")


class Forgetting:
    """Keep a gradio queue clean of sessions that nobody reads any more; where gradio's inside differs, do nothing.

    Args:
        queue: `Blocks._queue`.
    """

    def __init__(self, queue: Any) -> None:
        self._queue, self._known = queue, all(hasattr(queue, name) for name in _INSIDE)
        if self._known:
            self._clean = queue.clean_events
            queue.clean_events = self._cleaned

    async def _cleaned(self, *, session_hash: str | None = None, event_id: str | None = None) -> None:
        """gradio calls this where a reader is gone; its events say nothing more afterwards."""
        await self._clean(session_hash=session_hash, event_id=event_id)
        if session_hash is not None:
            self._forget(session_hash)

    def finished(self) -> None:
        """Forget the sessions whose events have all been read to their end. A tab begins anew with its next event."""
        if self._known:
            pending = self._queue.pending_event_ids_session
            for session in [one for one in self._queue.pending_messages_per_session if not pending.get(one)]:
                self._forget(session)

    def _forget(self, session: str) -> None:
        self._queue.pending_messages_per_session.pop(session, None)
        self._queue.pending_event_ids_session.pop(session, None)
