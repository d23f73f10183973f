"""A page without requests: freed memory goes back, and what gradio keeps of requests that are over is forgotten.

In a file of its own: another page of this process would give memory back in between.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from acdit.app import server
from acdit.app.leavers import Forgetting
from tests.app.served import image_model
from tests.app.serving import served_page
from tests.app.test_service import settled

pytest.importorskip("gradio", reason="the extra `app` is not installed")
gradio_client = pytest.importorskip("gradio_client", reason="the extra `app` is not installed")
httpx = pytest.importorskip("httpx")


def test_an_idle_server_gives_freed_memory_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def told() -> bool:
        given.append(time.monotonic())
        return True

    monkeypatch.setattr(server, "give_back_freed_memory", told)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    with served_page([image_model(torch.float32)]) as (address, service):
        time.sleep(0.6)
        assert not given  # nothing has been asked for yet
        client = gradio_client.Client(address, verbose=False)
        for count in (1, 2):
            job = client.submit({"steps": 200, "block": [1, 1]}, api_name="/image")
            while not job.outputs():
                time.sleep(0.02)
            time.sleep(0.6)  # longer than idle time, and at work
            assert service.running
            assert len(given) == count - 1
            client.predict(job.outputs()[0]["request"], api_name="/cancel")
            assert settled(service)
            ended = time.monotonic()
            while len(given) < count and time.monotonic() < ended + 20:
                time.sleep(0.02)
            time.sleep(0.6)
            assert len(given) == count


def test_what_is_over_is_forgotten_and_what_nobody_has_fetched_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio keeps messages and ids of every call; what it keeps must not grow, and nothing may be lost by that."""
    queues: list[Any] = []

    class Noted(Forgetting):
        def __init__(self, queue: Any) -> None:
            super().__init__(queue)
            queues.append(queue)

    monkeypatch.setattr(server, "Forgetting", Noted)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    with served_page([image_model(torch.float32)]) as (address, service), httpx.Client(timeout=60) as client:
        calls = f"{address}/gradio_api/call/image"

        def call(**settings: Any) -> str:
            return str(client.post(calls, json={"data": [settings, None]}).json()["event_id"])

        def kept() -> tuple[int, int]:
            return len(queues[0].pending_messages_per_session), len(queues[0].pending_event_ids_session)

        later = call(steps=1)
        while not service.running and not queues[0].event_analytics:
            time.sleep(0.01)
        assert settled(service)
        time.sleep(1)  # idle, and its messages still wait
        assert kept() == (1, 1)
        assert '"event": "done"' in client.get(f"{calls}/{later}").text
        leaver = call(steps=200, block=[1, 1])
        with client.stream("GET", f"{calls}/{leaver}") as answer:
            next(line for line in answer.iter_lines() if "generating" in line)
        assert settled(service)
        for _ in range(200):
            if kept() == (0, 0):
                break
            time.sleep(0.05)
        assert kept() == (0, 0)
        assert len(queues[0].event_analytics) <= 1
        assert queues[0].cached_event_analytics_summary == {"functions": {}}
