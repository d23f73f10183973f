"""Class-matched subsets: Fréchet distances compare only between equal sample counts and equal class shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from acdit.draws import keyed_generator
from acdit.errors import DataError
from acdit.evaluation.frechet import feature_statistics, frechet_distance


def class_matched_subset(labels: Tensor, per_class: Tensor, *, seed: int, repeat: int) -> Tensor:
    """Draw without replacement as many rows of each class as asked.

    Args:
        labels: (M,) classes.
        per_class: (num_classes,) how many of each.
        seed, repeat: key of the draw.

    Returns:
        Indices, (sum of per_class,).

    Raises:
        DataError: a class has too few rows.
    """
    generator = keyed_generator(seed, "class-matched subset", repeat)
    chosen = []
    for label, count in enumerate(per_class.tolist()):
        members = np.flatnonzero(labels.numpy() == label)
        if len(members) < count:
            raise DataError(f"class {label}", found=f"{len(members)} pictures", expected=f"at least {count}")
        chosen.append(generator.permutation(members)[:count])
    return torch.from_numpy(np.concatenate(chosen))


def matched_frechet_distance(
    features: Tensor,
    labels: Tensor,
    reference_features: Tensor,
    reference_labels: Tensor,
    *,
    repeats: int = 10,
    seed: int = 0,
) -> float:
    """Fréchet distance to a reference, both sides with the same count of every class.

    Every repeat draws from `features` as many rows of each class as the reference has; the distances are averaged.
    Equal counts give equal finite-sample bias, so two such figures against one reference compare.

    Args:
        features, labels: (M, F) and (M,), with at least the reference's count of every class.
        reference_features, reference_labels: (R, F) and (R,), all used.
        repeats, seed: of the draws.
    """
    reference = feature_statistics(reference_features)
    per_class = torch.bincount(reference_labels)
    distances = []
    for repeat in range(repeats):
        rows = class_matched_subset(labels, per_class, seed=seed, repeat=repeat)
        distances.append(frechet_distance(*feature_statistics(features[rows]), *reference))
    return float(np.mean(distances))
