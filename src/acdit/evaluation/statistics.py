"""Mean and covariance of features that never lie in memory together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acdit.errors import DataError


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of the features seen so far, in fp64; two of them merge into that of both (Chan, Golub &
    LeVeque 1979), so neither the order nor the place in which parts are taken matters beyond rounding.

    Args:
        dim: F.
    """

    dim: int

    def __post_init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(self.dim, dtype=torch.float64)
        self.scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        """Sum of (x − mean)(x − mean)ᵀ."""

    def update(self, features: Tensor) -> None:
        """Add features (M, F)."""
        part = FeatureStatistics(self.dim)
        part.count = len(features)
        wide = features.double()
        part.mean = wide.mean(dim=0)
        centred = wide - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another one has seen."""
        if other.count == 0:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.mean += shift * (other.count / total)
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (F, F).

        Raises:
            DataError: fewer than two features.
        """
        if self.count < 2:
            raise DataError("statistics of features", found=f"{self.count} pictures", expected="at least 2")
        return self.scatter / (self.count - 1)


@dataclass
class InceptionScore:
    """exp of the mean KL divergence between p(y|x) and p(y) (Salimans et al. 2016), the mean over splits of 5,000
    pictures, as ADM's evaluator takes it; kept as sums, which merge.

    Args:
        classes: of the classifier.
        split_size: pictures a split, in the order of their indices.
    """

    classes: int
    split_size: int = 5000

    def __post_init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        """Split → Σ p(y|x), then Σ Σ_y p log p, then the count: (classes + 2,) fp64."""

    def update(self, probabilities: Tensor, first: int) -> None:
        """Add p(y|x) (M, classes) of the pictures first … first + M − 1."""
        wide = probabilities.double()
        split = (torch.arange(len(wide)) + first) // self.split_size
        entropies = torch.special.xlogy(wide, wide).sum(dim=1)
        for index in split.unique().tolist():
            rows = split == index
            sums = torch.cat([wide[rows].sum(dim=0), entropies[rows].sum()[None], rows.sum()[None].double()])
            self.add(index, sums)

    def add(self, split: int, sums: Tensor) -> None:
        """Add sums of a split, as `sums` has them."""
        self.sums[split] = self.sums[split] + sums if split in self.sums else sums

    def value(self) -> float:
        """The score, 1 … classes."""
        scores = []
        for sums in self.sums.values():
            count = sums[-1]
            marginal = sums[:-2] / count
            scores.append((sums[-2] / count - torch.special.xlogy(marginal, marginal).sum()).exp())
        return float(torch.stack(scores).mean())
