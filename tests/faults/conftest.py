"""What the campaigns count."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest


class Tally(Counter[str]):
    """How many cases had which outcome, and other figures of a campaign."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, float] = {}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts of this test; printed at its end, and appended as a line of JSON to the file ACDIT_CAMPAIGN_LOG."""
    counted, started = Tally(), time.perf_counter()
    yield counted
    line = json.dumps(
        {
            "test": request.node.nodeid, "cases": sum(counted.values()), "outcomes": dict(sorted(counted.items())),
            **counted.figures, "seconds": round(time.perf_counter() - started, 1),
        }
    )  # fmt: skip
    print(line)
    if log := os.environ.get("ACDIT_CAMPAIGN_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(line + "\n")
