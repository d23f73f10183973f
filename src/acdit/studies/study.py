"""What a study is: a frozen description of arms, figures and claims. Nothing here trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

REPRODUCES = "reproduces"
CONTRARY = "does not reproduce"
OPEN = "not resolved"


@dataclass(frozen=True)
class Metric:
    """A figure that is measured of every arm and seed."""

    key: str
    """In the reading."""
    label: str
    lower_is_better: bool
    ratio: bool = False
    """Compared as a ratio (a distance), else as a difference (a share)."""

    def cost(self, value: float) -> float:
        """The value on the scale on which arms are compared: more is worse."""
        scaled = math.log(value) if self.ratio else value
        return scaled if self.lower_is_better else -scaled

    def shown(self, cost: float) -> str:
        """A difference of costs in words: "× 1.20", "+3.1 points"."""
        return f"× {math.exp(cost):.2f}" if self.ratio else f"{100 * cost:+.1f} points"


@dataclass(frozen=True)
class Branch:
    """An arm that goes on from another one's run, with its own schedule (the WSD decay)."""

    trunk: tuple[str, ...]
    """Overrides of the run it starts from."""
    at: float
    """Where, as a share of the study's steps."""
    until: float
    """Where it ends, likewise."""


@dataclass(frozen=True)
class Arm:
    """A point of a figure: one recipe, trained once a seed."""

    label: str
    overrides: tuple[str, ...] = ()
    """What it changes in the study's recipe."""
    line: str = ""
    """The curve it belongs to."""
    x: float = 0
    tick: str = ""
    """What stands below the axis at x."""
    at: float | None = None
    """Measured at this share of the steps; None: at the end."""
    weights: str = "ema"
    """Which are measured: "ema" or "raw"."""
    branch: Branch | None = None


@dataclass(frozen=True)
class Claim:
    """One thing the paper found, as one contrast of arms, so that one interval decides it."""

    text: str
    metric: str
    """Key of the metric."""
    contrast: tuple[tuple[str, float], ...]
    """(arm's label, weight); the weighted sum of the arms' mean costs is what the claim is about."""
    margin: float | None = None
    """None: the claim says that the contrast is above 0. Else: that it is below this (a cost that does not matter)."""
    presumes: tuple[tuple[str, float], ...] | None = None
    """A contrast that the claim takes for granted to be above 0: a gap that closes must be there."""


@dataclass(frozen=True)
class Study:
    """A figure of the paper in small."""

    name: str
    figure: str
    question: str
    recipe: str
    """The base: a shipped recipe."""
    overrides: tuple[str, ...]
    """What all arms change in it."""
    measure: str
    """Which measurement, by name; see `acdit.studies.measures`."""
    metrics: tuple[Metric, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    axis: str
    """What goes to the right."""
    floor: tuple[str, float] | None = None
    """(key of a metric, value): a claim about arms of which none gets so far on average is not judged. Models that have
    learned nothing are all alike, and would let "costs nothing" pass."""
    log_axis: bool = False
    note: str = ""

    def metric(self, key: str) -> Metric:
        """The metric of that key."""
        return next(metric for metric in self.metrics if metric.key == key)


def better_to_worse(*labels: str) -> tuple[tuple[str, float], ...]:
    """The contrast of a trend: evenly spaced weights, scaled so that it is the cost from the first arm to the last one
    if costs rise evenly. Of two arms it is their difference."""
    middle = (len(labels) - 1) / 2
    scale = sum((place - middle) ** 2 for place in range(len(labels))) / (len(labels) - 1)
    return tuple((label, (place - middle) / scale) for place, label in enumerate(labels))


def ends(first: str, last: str) -> tuple[tuple[str, float], ...]:
    """The contrast of two arms: what the last one costs more than the first."""
    return ((first, -1.0), (last, 1.0))


def gap_closes(wide: tuple[str, str], narrow: tuple[str, str]) -> tuple[tuple[str, float], ...]:
    """The contrast of two gaps: by how much (from, to) of `wide` costs more than (from, to) of `narrow`."""
    return ((wide[0], -1.0), (wide[1], 1.0), (narrow[0], 1.0), (narrow[1], -1.0))
