"""Accuracy and its interval, against their definitions."""

from __future__ import annotations

import pytest

from acdit.evaluation.intervals import wilson_interval


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (997, 1000), (1, 1)])
def test_wilsons_bounds_are_the_shares_that_are_just_not_refuted(right: int, total: int) -> None:
    """A bound p is where (p̂ − p)² = z² p (1 − p) / n."""
    z = 1.959963984540054
    for bound in wilson_interval(right, total):
        assert 0 <= bound <= 1
        assert (right / total - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / total, abs=1e-12)


def test_a_known_interval() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
