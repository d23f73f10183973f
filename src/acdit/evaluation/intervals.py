"""Intervals of measured figures."""

from __future__ import annotations

import math

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
