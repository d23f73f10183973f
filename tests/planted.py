"""Planted faults: code that is broken on purpose, and the test that has to notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Plant = Callable[[pytest.MonkeyPatch], None]


def require_caught(plant: Plant, named_test: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test passes as things are, and fails once the fault is planted."""
    named_test()
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            named_test()
