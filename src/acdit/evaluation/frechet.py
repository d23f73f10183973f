"""Fréchet distance between Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from acdit.errors import NonFiniteError


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of features (M, F), in fp64."""
    wide = features.double()
    return wide.mean(dim=0), torch.cov(wide.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    tr (Σ₁Σ₂)^½ is taken as tr (Σ₁^½ Σ₂ Σ₁^½)^½: the same number, but of symmetric matrices, so that eigenvalues are
    real and rank-deficient covariances need no offset.

    Args:
        mean1, mean2: (F,).
        cov1, cov2: (F, F), symmetric positive semi-definite.

    Returns:
        The squared 2-Wasserstein distance of the two Gaussians, ≥ 0 up to rounding; computed in fp64.

    Raises:
        NonFiniteError: NaN or infinity in the statistics.
    """
    mean1, cov1, mean2, cov2 = (part.double() for part in (mean1, cov1, mean2, cov2))
    if not all(bool(part.isfinite().all()) for part in (mean1, cov1, mean2, cov2)):
        raise NonFiniteError(
            "Fréchet distance", found="NaN or infinite feature statistics", fix="look for non-finite samples"
        )
    root = _symmetric_root(cov1)
    cross = torch.linalg.eigvalsh(_symmetrize(root @ cov2 @ root)).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_symmetrize(matrix))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _symmetrize(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
