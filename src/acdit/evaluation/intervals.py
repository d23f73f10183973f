"""Intervals of measured figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL_95 = 1.959963984540054
"""The normal quantile of 0.975: half the width of a 95 % interval, in standard errors."""


def wilson_interval(right: int, total: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): never beyond [0, 1], sane at 0 and at `total`.

    Args:
        right: successes.
        total: trials, at least one.
        z: normal quantile; the default is for 95 %.
    """
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Half the width of a two-sided interval of Student's t, in standard errors.

    By bisection of the closed form that whole degrees of freedom have (Abramowitz & Stegun 26.7.3 and 26.7.4).

    Args:
        freedom: degrees of freedom, at least one.
        confidence: share of the distribution inside, above 0 and below 1.
    """
    low, high = 0.0, 1.0
    while _share_within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if _share_within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean of independent values; None of fewer than two, whose spread nobody knows."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1, confidence) * math.sqrt(variance / count)
    return mean - half, mean + half


def _share_within(t: float, freedom: int) -> float:
    """P(|T| ≤ t)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total
