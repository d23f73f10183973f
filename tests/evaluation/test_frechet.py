from __future__ import annotations

import numpy as np
import pytest
import torch

from acdit.errors import DataError, NonFiniteError
from acdit.evaluation import class_matched_subset, feature_statistics, frechet_distance, matched_frechet_distance


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def test_equal_gaussians_are_at_distance_zero() -> None:
    mean, cov = torch.randn(16, dtype=torch.float64), random_covariance(16, 40, 0)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-10


def test_a_shift_costs_its_square() -> None:
    cov = random_covariance(8, 20, 1)
    assert frechet_distance(torch.zeros(8), cov, torch.full((8,), 2.0), cov) == pytest.approx(32.0, abs=1e-9)


def test_commuting_covariances_have_a_closed_form() -> None:
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 0.0, 0.25])
    zero = torch.zeros(4)
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(zero, first.diag(), zero, second.diag()) == pytest.approx(expected, abs=1e-12)


def test_one_dimension_is_the_textbook_formula() -> None:
    distance = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([3.0]), torch.tensor([[9.0]]))
    assert distance == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


@pytest.mark.parametrize("rank", [64, 80])
def test_it_equals_scipys_square_root(rank: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_covariance(64, rank, 2), random_covariance(64, rank + 5, 3)
    mean = torch.randn(64, dtype=torch.float64)
    root = linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = float(mean.square().sum() + a.trace() + b.trace()) - 2 * float(np.trace(root))
    assert frechet_distance(mean, a, torch.zeros(64), b) == pytest.approx(expected, rel=1e-7)


def test_rank_deficient_covariances_need_no_offset() -> None:
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    a = basis[:, :3] @ torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) @ basis[:, :3].T
    b = basis[:, 5:7] @ basis[:, 5:7].T
    zero = torch.zeros(20)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(8.0, abs=1e-6)  # disjoint supports: the traces add up
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a), abs=1e-6)


def test_not_a_number_is_an_error_not_a_distance() -> None:
    mean = torch.tensor([float("nan")])
    with pytest.raises(NonFiniteError):
        frechet_distance(mean, torch.eye(1), mean, torch.eye(1))


def test_statistics_are_numpys() -> None:
    features = torch.randn(50, 6)
    mean, cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == torch.float64
    assert np.allclose(mean, features.double().numpy().mean(0))
    assert np.allclose(cov, np.cov(features.double().numpy(), rowvar=False))


# --- equal counts ------------------------------------------------------------------------------------------------


def test_subsets_match_the_class_counts_and_repeat_no_row() -> None:
    labels = torch.arange(200) % 4
    counts = torch.tensor([5, 0, 50, 7])
    rows = class_matched_subset(labels, counts, seed=0, repeat=0)
    assert torch.bincount(labels[rows], minlength=4).tolist() == counts.tolist()
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, class_matched_subset(labels, counts, seed=0, repeat=0))
    assert not torch.equal(rows, class_matched_subset(labels, counts, seed=0, repeat=1))


def test_a_class_with_too_few_pictures_is_an_error() -> None:
    with pytest.raises(DataError, match="class 1; found 3 pictures; expected at least 4"):
        class_matched_subset(torch.tensor([0] * 9 + [1] * 3), torch.tensor([2, 4]), seed=0, repeat=0)


def test_the_matched_distance_does_not_depend_on_how_many_rows_the_larger_side_has() -> None:
    """The finite-sample bias follows the reference's count: 400 and 4,000 rows of one distribution score alike."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(4000, 16, generator=generator)
    reference, labels = torch.randn(200, 16, generator=generator), torch.arange(4000) % 2
    few = matched_frechet_distance(pool[:400], labels[:400], reference, labels[:200])
    many = matched_frechet_distance(pool, labels, reference, labels[:200])
    assert few == pytest.approx(many, rel=0.2)
    unmatched = frechet_distance(*feature_statistics(pool), *feature_statistics(reference))
    assert unmatched < 0.7 * many


def test_the_matched_distance_undoes_unequal_class_shares() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 900 + [1] * 100)
    features = torch.randn(1000, 2, generator=generator) + 10 * labels[:, None]
    reference_labels = torch.arange(180) % 2
    reference = torch.randn(180, 2, generator=generator) + 10 * reference_labels[:, None]
    assert matched_frechet_distance(features, labels, reference, reference_labels) < 1
    assert frechet_distance(*feature_statistics(features), *feature_statistics(reference)) > 20
