"""What the rule makes of planted figures: worse is called worse, noise is called open, and so is a single seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from acdit.studies.report import judged_claim
from acdit.studies.study import CONTRARY, OPEN, REPRODUCES, Claim, Metric, better_to_worse, ends, gap_closes
from acdit.studies.verdict import contrast_of, leans, verdict_of

DISTANCE = Metric("distance", "distance", lower_is_better=True, ratio=True)
SHARE = Metric("share", "share", lower_is_better=False)


def judged(claim: Claim, metric: Metric, values: dict[str, list[float]]) -> str:
    costs = {arm: [metric.cost(value) for value in found] for arm, found in values.items()}
    return verdict_of(claim, contrast_of(claim.contrast, costs))


def test_a_planted_worse_arm_is_called_worse() -> None:
    claim = Claim("a is better than b", "distance", ends("a", "b"))
    good, bad = [10.0, 10.4, 9.8], [14.0, 14.9, 14.2]
    assert judged(claim, DISTANCE, {"a": good, "b": bad}) == REPRODUCES
    assert judged(claim, DISTANCE, {"a": bad, "b": good}) == CONTRARY


def test_more_is_better_of_a_share() -> None:
    claim = Claim("a is better than b", "share", ends("a", "b"))
    assert judged(claim, SHARE, {"a": [0.95, 0.96, 0.955], "b": [0.8, 0.81, 0.805]}) == REPRODUCES
    assert judged(claim, SHARE, {"a": [0.8, 0.81, 0.805], "b": [0.95, 0.96, 0.955]}) == CONTRARY


def test_noise_is_not_resolved() -> None:
    """Three seeds of equal arms: at most about one in twenty is called either way."""
    generator = np.random.default_rng(0)
    claim = Claim("a is better than b", "distance", ends("a", "b"))
    called = 0
    for _ in range(1000):
        values = {arm: np.exp(0.1 * generator.standard_normal(3) + 2).tolist() for arm in "ab"}
        called += judged(claim, DISTANCE, values) != OPEN
    assert called <= 60


def test_one_seed_decides_nothing_however_far_apart() -> None:
    claim = Claim("a is better than b", "distance", ends("a", "b"))
    assert judged(claim, DISTANCE, {"a": [1.0], "b": [100.0]}) == OPEN
    contrast = contrast_of(claim.contrast, {"a": [0.0], "b": [1.0]})
    assert contrast.interval is None
    assert "the paper's way" in leans(claim, contrast)
    assert "the other way" in leans(claim, contrast_of(claim.contrast, {"a": [1.0], "b": [0.0]}))


def test_a_trend_is_one_contrast() -> None:
    weights = dict(better_to_worse("a", "b", "c"))
    assert weights == {"a": -1.0, "b": 0.0, "c": 1.0}
    assert dict(better_to_worse("a", "b")) == {"a": -1.0, "b": 1.0}
    four = better_to_worse("a", "b", "c", "d")
    costs = {arm: [float(place), float(place)] for place, arm in enumerate("abcd")}
    found = contrast_of(four, costs)
    assert found.estimate == pytest.approx(3.0)  # from the first to the last
    assert found.interval == (found.estimate, found.estimate)


def test_welchs_interval_in_a_worked_case() -> None:
    """Variances 1 and 4 of three values each: standard error √(5/3), Satterthwaite's 25 / (1 + 16) · 2 = 2.94 degrees,
    rounded down to 2."""
    costs = {"a": [-1.0, 0.0, 1.0], "b": [8.0, 10.0, 12.0]}
    found = contrast_of(ends("a", "b"), costs)
    assert found.freedom == 2
    assert found.interval is not None
    half = 4.302652729749 * math.sqrt(5 / 3)
    assert found.interval == (pytest.approx(10 - half), pytest.approx(10 + half))
    even = contrast_of(ends("a", "b"), {"a": [-1.0, 0.0, 1.0], "b": [9.0, 10.0, 11.0]})
    assert even.freedom == 4  # equal variances lose no degree to rounding


def test_no_cost_is_a_margin() -> None:
    claim = Claim("b costs nothing", "distance", ends("a", "b"), margin=0.1)
    same = [10.0, 10.1, 9.95]
    assert judged(claim, DISTANCE, {"a": same, "b": [10.05, 10.0, 9.9]}) == REPRODUCES
    assert judged(claim, DISTANCE, {"a": same, "b": [15.0, 15.2, 14.9]}) == CONTRARY
    assert judged(claim, DISTANCE, {"a": same, "b": [9.0, 11.0, 13.0]}) == OPEN
    assert judged(claim, DISTANCE, {"a": same, "b": [5.0, 5.1, 5.05]}) == REPRODUCES  # better is no cost


def test_a_gap_that_closes() -> None:
    claim = Claim("closes", "distance", gap_closes(("small 1", "small 16"), ("large 1", "large 16")))
    values = {
        "small 1": [10.0, 10.2, 10.1], "small 16": [20.0, 20.5, 20.2],
        "large 1": [5.0, 5.1, 5.05], "large 16": [6.0, 6.1, 6.05],
    }  # fmt: skip
    assert judged(claim, DISTANCE, values) == REPRODUCES
    turned = {"small 1": values["large 1"], "small 16": values["large 16"], "large 1": values["small 1"],
              "large 16": values["small 16"]}  # fmt: skip
    assert judged(claim, DISTANCE, turned) == CONTRARY


def test_a_gap_that_is_not_there_cannot_close() -> None:
    claim = Claim("closes", "distance", gap_closes(("small 1", "small 16"), ("large 1", "large 16")),
                  presumes=ends("small 1", "small 16"))  # fmt: skip
    values = {
        "small 1": [20.0, 20.5, 20.2], "small 16": [18.0, 18.5, 18.2],
        "large 1": [10.0, 10.2, 10.1], "large 16": [5.0, 5.1, 5.05],
    }  # fmt: skip
    costs = {arm: [DISTANCE.cost(value) for value in found] for arm, found in values.items()}
    found = judged_claim(claim, DISTANCE, costs, "")
    assert found["verdict"] == OPEN
    assert "takes for granted" in found["shown"]
    costs["small 16"] = [DISTANCE.cost(value) for value in (30.0, 31.0, 30.5)]
    assert judged_claim(claim, DISTANCE, costs, "")["verdict"] == REPRODUCES


def test_effects_in_words() -> None:
    assert DISTANCE.shown(math.log(1.2)) == "× 1.20"
    assert SHARE.shown(0.031) == "+3.1 points"
