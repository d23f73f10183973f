"""From figures of a few seeds to a verdict: one contrast of arms, one interval, one rule.

A claim is about a weighted sum of the arms' mean costs. Its 95 % interval is Welch's (arms spread differently), with
Welch and Satterthwaite's degrees of freedom rounded down, so it errs on the wide side. It decides alone:

    the interval lies where the claim says (above 0, or below the margin)    reproduces
    it lies on the other side                                                does not reproduce
    it holds the border, or there are fewer than two seeds of an arm         not resolved

A claim may presume something, such as a gap that closes; where the means do not show it, it is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acdit.evaluation.intervals import t_quantile
from acdit.studies.study import CONTRARY, OPEN, REPRODUCES, Claim

RULE = (
    "A claim is one contrast of the arms' mean costs (log distance; share, negated where more is better), which the "
    "paper's finding puts above 0, or below a margin. Its 95 % interval over seeds (Welch) lies there: reproduces; on "
    "the other side: does not reproduce; it holds the border, or an arm has fewer than two seeds, or none has learned "
    "enough to be compared, or the means lack a gap that is said to close: not resolved. Claims are judged one by "
    "one, without a correction for their number. Arms of a study see the same samples in the same number of steps, "
    "unless the study varies that; training FLOPs stand beside."
)


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of means."""

    estimate: float
    interval: tuple[float, float] | None
    """95 %; None where an arm has fewer than two values."""
    freedom: int | None
    """Degrees of freedom; None where there is no interval, or nothing varied at all."""


def contrast_of(weights: Sequence[tuple[str, float]], costs: Mapping[str, Sequence[float]]) -> Contrast:
    """The contrast with its interval.

    Args:
        weights: (arm, weight).
        costs: of each arm, one a seed.
    """
    estimate = sum(weight * _mean(costs[arm]) for arm, weight in weights)
    moving = [(arm, weight) for arm, weight in weights if weight]
    if any(len(costs[arm]) < 2 for arm, _ in moving):
        return Contrast(estimate, None, None)
    parts = [(weight**2 * _variance(costs[arm]) / len(costs[arm]), len(costs[arm]) - 1) for arm, weight in moving]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Contrast(estimate, (estimate, estimate), None)
    # Relative to the total, and a little above: rounding must not take a whole degree.
    freedom = max(1, math.floor(1 / sum((part / total) ** 2 / free for part, free in parts) + 1e-9))
    half = t_quantile(freedom) * math.sqrt(total)
    return Contrast(estimate, (estimate - half, estimate + half), freedom)


def verdict_of(claim: Claim, contrast: Contrast) -> str:
    """What the interval says of the claim."""
    if contrast.interval is None:
        return OPEN
    low, high = contrast.interval
    border = 0.0 if claim.margin is None else claim.margin
    above, below = low > border, high < border
    if claim.margin is None:
        return REPRODUCES if above else CONTRARY if below else OPEN
    return REPRODUCES if below else CONTRARY if above else OPEN


def leans(claim: Claim, contrast: Contrast) -> str:
    """Which way the estimate alone points, for a claim that is not resolved."""
    border = 0.0 if claim.margin is None else claim.margin
    if contrast.estimate == border:
        return "the means are equal"
    with_paper = contrast.estimate > border if claim.margin is None else contrast.estimate < border
    return "the means point the paper's way" if with_paper else "the means point the other way"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
