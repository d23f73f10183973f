"""Many at once: 64 clients, 500 requests, three in ten leave early (campaign)."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from acdit.app import server
from acdit.app.requests import Limits
from acdit.app.service import Service
from tests.app.served import image_model
from tests.app.serving import served_page
from tests.app.test_service import settled

pytestmark = pytest.mark.campaign
httpx = pytest.importorskip("httpx", reason="the extra `app` is not installed")
psutil = pytest.importorskip("psutil")
pytest.importorskip("gradio", reason="the extra `app` is not installed")
CLIENTS = int(os.environ.get("ACDIT_LOAD_CLIENTS", "64"))
REQUESTS = int(os.environ.get("ACDIT_LOAD_REQUESTS", "500"))
CANCELLED = 0.3


async def one(client: Any, address: str, index: int, leaves: bool, counts: Counter[str]) -> None:
    """One request; "busy" is tried again, as a person would."""
    settings = {"label": index % 5, "seed": index, "steps": 4}
    for _ in range(400):
        asked = await client.post(f"{address}/gradio_api/call/image", json={"data": [settings, None]})
        counts[f"status {asked.status_code // 100}xx"] += 1
        assert asked.status_code < 500, asked.text
        event = asked.json()["event_id"]
        ended = None
        async with client.stream("GET", f"{address}/gradio_api/call/image/{event}") as answer:
            counts[f"status {answer.status_code // 100}xx"] += 1
            kind = ""
            async for line in answer.aiter_lines():
                kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
                if leaves and kind == "generating":
                    ended = "left"
                    break
                if kind == "error" and line.startswith("data:"):
                    ended = "busy" if "busy" in line else f"error {line[:200]}"
                    break
                if line.startswith("data:") and '"event": "done"' in line:
                    told = json.loads(line[5:])[0]
                    assert told["settings"]["seed"] == index
                    ended = "done"
                if kind == "complete" and line.startswith("data:"):
                    break
        if ended == "busy":
            counts["busy"] += 1
            await asyncio.sleep(random.uniform(0.05, 0.5))
            continue
        counts[str(ended)] += 1
        return
    counts["never served"] += 1


async def load(address: str, requests: int, leaving: set[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    numbers = iter(range(requests))

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as own:
            for index in numbers:
                await one(own, address, index, index in leaving, counts)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return counts


def apart(address: str, requests: int, leaving: set[int]) -> Counter[str]:
    """The clients in a process of their own, so that what they hold does not count as the server's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_load, address, requests, leaving).result()


def run_load(address: str, requests: int, leaving: set[int]) -> Counter[str]:
    return asyncio.run(load(address, requests, leaving))


def given_back(service: Service) -> None:
    """Until nothing runs, and the idle server has given back what it does not need."""
    assert settled(service)
    time.sleep(max(0.0, server.IDLE_SECONDS - service.idle_seconds(time.monotonic())) + 1)


def test_load() -> None:
    with served_page([image_model(torch.float32)], Limits(patience=5.0)) as (address, service):
        apart(address, 2 * CLIENTS, set())  # what is made once: threads, connections, kernels
        process = psutil.Process()
        given_back(service)
        before = process.memory_info().rss
        leaving = set(random.Random(0).sample(range(REQUESTS), int(CANCELLED * REQUESTS)))
        counts = apart(address, REQUESTS, leaving)
        busiest = process.memory_info().rss - before
        given_back(service)
        growth = process.memory_info().rss - before
        told = f"memory grew by {growth / 2**20:.1f} MiB, {busiest / 2**20:.1f} at the end of the work"
        print(f"load: {dict(counts)}, {told}")
        assert counts["status 5xx"] == 0
        assert counts["done"] + counts["left"] == REQUESTS, counts
        assert counts["left"] <= len(leaving)
        assert growth <= 64 * 2**20
        assert service.live_caches == 0
