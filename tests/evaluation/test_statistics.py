from __future__ import annotations

import numpy as np
import pytest
import torch

from acdit.errors import DataError, NonFiniteError
from acdit.evaluation import feature_statistics, frechet_distance
from acdit.evaluation.precision_recall import precision_recall
from acdit.evaluation.statistics import FeatureStatistics, InceptionScore


def test_statistics_in_parts_and_merged_are_those_of_the_whole() -> None:
    features = torch.randn(997, 12, dtype=torch.float64) * torch.arange(1, 13) + 1e4  # far from zero: no cancellation
    mean, covariance = feature_statistics(features)
    one, other = FeatureStatistics(12), FeatureStatistics(12)
    for index, part in enumerate(features.split(100)):
        (one if index % 2 else other).update(part)
    one.merge(other)
    one.merge(FeatureStatistics(12))
    assert one.count == 997
    assert float((one.mean - mean).abs().max()) < 1e-9
    assert float((one.covariance - covariance).abs().max()) < 1e-9 * float(covariance.abs().max())


def test_one_picture_has_no_covariance() -> None:
    statistics = FeatureStatistics(3)
    statistics.update(torch.ones(1, 3))
    with pytest.raises(DataError, match="at least 2"):
        _ = statistics.covariance


def test_the_distance_equals_an_independent_computation_from_eigenvalues() -> None:
    """tr (Σ₁Σ₂)^½ as the sum of square roots of the product's eigenvalues, in numpy and without symmetrising."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((500, 40)), generator.standard_normal((300, 40)) @ np.diag(np.linspace(0.1, 3, 40))
    b += 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    sides = []
    for features in (a, b):
        statistics = FeatureStatistics(40)
        for part in torch.from_numpy(features).split(64):
            statistics.update(part)
        sides += [statistics.mean, statistics.covariance]
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_distance_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = torch.randn(300, 32, dtype=torch.float64), torch.randn(200, 32, dtype=torch.float64) * 2 + 0.1
    expected = fid._compute_fid(*feature_statistics(a), *feature_statistics(b))
    assert frechet_distance(*feature_statistics(a), *feature_statistics(b)) == pytest.approx(float(expected), rel=1e-6)


def test_inception_score_has_closed_forms() -> None:
    sure = torch.eye(8).repeat(100, 1)  # every class equally often, each time certain: the number of classes
    undecided = torch.full((100, 8), 1 / 8)
    for probabilities, expected in ((sure, 8.0), (undecided, 1.0)):
        score = InceptionScore(8)
        score.update(probabilities, 0)
        assert score.value() == pytest.approx(expected, rel=1e-6)


def test_inception_score_is_the_mean_over_splits_however_the_parts_are_cut() -> None:
    probabilities = torch.randn(70, 5).mul(3).softmax(dim=1).double()
    expected = []
    for part in probabilities.numpy().reshape(2, 35, 5):
        divergence = (part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1)
        expected.append(np.exp(divergence.mean()))
    score = InceptionScore(5, split_size=35)
    for first in range(0, 70, 16):
        score.update(probabilities[first : first + 16], first)
    assert score.value() == pytest.approx(np.mean(expected), rel=1e-12)
    assert len(score.sums) == 2


# --- precision and recall -----------------------------------------------------------------------------------------


def brute_force(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    """The definition, a distance at a time."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.sqrt(np.square(x - y).sum()) for y in b] for x in a])

    def radii(points: np.ndarray) -> np.ndarray:
        return np.sort(distances(points, points), axis=1)[:, k]  # the first is the point itself

    between = distances(reference, samples)
    precision = (between <= radii(reference)[:, None]).any(axis=0).mean()
    recall = (between <= radii(samples)[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


@pytest.mark.parametrize("chunks", [(1000, 1000), (7, 11), (1, 3)])
def test_chunked_precision_and_recall_are_the_brute_force_ones(chunks: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    samples = generator.standard_normal((60, 3)) * 0.7 + 100
    reference = generator.standard_normal((50, 3)) + np.array([100.5, 100, 100])
    expected = brute_force(samples, reference, 3)
    assert 0.1 < expected[1] < expected[0] < 1.0
    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), 3, *chunks)
    assert found == pytest.approx(expected)


def test_samples_in_one_mode_are_precise_and_forget_the_other() -> None:
    two_modes = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 50])
    precision, recall = precision_recall(torch.randn(100, 2), two_modes)
    assert precision > 0.85
    assert recall < 0.55
    assert precision_recall(two_modes, two_modes) == (1.0, 1.0)
    assert precision_recall(two_modes + 500, two_modes) == (0.0, 0.0)


def test_precision_needs_more_points_than_neighbours_and_numbers() -> None:
    with pytest.raises(DataError, match="samples; found 3 pictures; expected more than 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    bad = torch.zeros(9, 2)
    bad[4] = float("nan")
    with pytest.raises(NonFiniteError, match="reference"):
        precision_recall(torch.zeros(9, 2), bad)
