"""Student's quantiles and intervals against closed values."""

from __future__ import annotations

import math

import pytest

from acdit.evaluation.intervals import NORMAL_95, mean_interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of printed tables
    [(3, 3.182446), (4, 2.776445), (5, 2.570582), (7, 2.364624), (10, 2.228139), (30, 2.042272), (100, 1.983972)],
)
def test_quantiles_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99, 0.999])
def test_quantiles_in_closed_form(confidence: float) -> None:
    assert t_quantile(1, confidence) == pytest.approx(math.tan(math.pi / 2 * confidence), rel=1e-12)  # Cauchy's
    share = (1 + confidence) / 2
    assert t_quantile(2, confidence) == pytest.approx(
        confidence * math.sqrt(2 / (4 * share * (1 - share))), rel=1e-12
    )  # of two degrees


def test_many_degrees_are_the_normal_distribution() -> None:
    assert t_quantile(20_000) == pytest.approx(NORMAL_95, abs=2e-4)


def test_the_interval_of_a_mean() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    half = 4.302652729749 / math.sqrt(3)  # standard deviation 1
    assert (low, high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert mean_interval([5.0, 5.0]) == (5.0, 5.0)
    assert mean_interval([5.0]) is None
