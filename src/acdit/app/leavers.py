"""What gradio's queue keeps of requests that are over: forgotten, so that a page that stays open does not grow.

gradio holds the messages of up to 2,000 sessions, read or not, and the ids of the events of those who left for ever;
every call of the API is a session. They are small, but lie among what every request needs for a moment, and hold whole
pages of memory that would be free.
"""

from __future__ import annotations

from typing import Any


class Forgetting:
    """Keep a gradio queue clean of sessions that nobody reads any more; where gradio's inside differs, do nothing.

    Args:
        queue: `Blocks._queue`.
    """

    def __init__(self, queue: Any) -> None:
        self._messages = getattr(queue, "pending_messages_per_session", None)
        self._pending = getattr(queue, "pending_event_ids_session", None)
        self._clean = getattr(queue, "clean_events", None)
        self.works = isinstance(self._messages, dict) and isinstance(self._pending, dict) and callable(self._clean)
        if self.works:
            queue.clean_events = self._cleaned

    async def _cleaned(self, *, session_hash: str | None = None, event_id: str | None = None) -> None:
        """gradio calls this where a reader is gone; its events say nothing more afterwards."""
        assert self._clean is not None
        await self._clean(session_hash=session_hash, event_id=event_id)
        if session_hash is not None:
            self._forget(session_hash)

    def finished(self) -> None:
        """Forget the sessions whose events have all been read to their end. A tab begins anew with its next event."""
        if self.works:
            for session in [one for one in self._messages or () if not (self._pending or {}).get(one)]:
                self._forget(session)

    def _forget(self, session: str) -> None:
        for held in (self._messages, self._pending):
            if held is not None:
                held.pop(session, None)
