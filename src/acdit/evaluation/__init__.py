"""What samples are measured with."""

from acdit.evaluation.classifier import SmallClassifier, train_classifier
from acdit.evaluation.frechet import feature_statistics, frechet_distance
from acdit.evaluation.neighbours import nearest_training_distance
from acdit.evaluation.subsets import class_matched_subset, matched_frechet_distance

__all__ = [
    "SmallClassifier",
    "class_matched_subset",
    "feature_statistics",
    "frechet_distance",
    "matched_frechet_distance",
    "nearest_training_distance",
    "train_classifier",
]
