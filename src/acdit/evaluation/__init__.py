"""What samples are measured with."""

from acdit.evaluation.classifier import (
    ClassifierFacts,
    PictureClassifier,
    ResidualClassifier,
    SmallClassifier,
    digits_judge,
    load_classifier,
    save_classifier,
    train_classifier,
)
from acdit.evaluation.frechet import feature_statistics, frechet_distance
from acdit.evaluation.neighbours import nearest_training_distance
from acdit.evaluation.subsets import class_matched_subset, matched_frechet_distance

__all__ = [
    "ClassifierFacts",
    "PictureClassifier",
    "ResidualClassifier",
    "SmallClassifier",
    "class_matched_subset",
    "digits_judge",
    "feature_statistics",
    "frechet_distance",
    "load_classifier",
    "matched_frechet_distance",
    "nearest_training_distance",
    "save_classifier",
    "train_classifier",
]
