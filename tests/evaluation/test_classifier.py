from __future__ import annotations

import pytest
import torch

from acdit.data import DigitsDataset
from acdit.errors import DataError
from acdit.evaluation import SmallClassifier, nearest_training_distance, train_classifier


def test_it_reads_real_digits_and_leaves_the_global_generator_alone() -> None:
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    before = torch.get_rng_state()
    classifier, accuracy = train_classifier(
        train.images, train.labels, held_out.images, held_out.labels, epochs=6, required_accuracy=0.95
    )
    assert torch.equal(before, torch.get_rng_state())
    assert accuracy >= 0.95
    assert not classifier.training
    assert classifier.features(held_out.images).shape == (500, 64)
    same = classifier.accuracy(held_out.images.float() / 255, held_out.labels)
    assert same == pytest.approx(accuracy)
    wrong = classifier.accuracy(held_out.images, (held_out.labels + 1) % 10)
    assert wrong < 0.05


def test_a_judge_that_cannot_read_is_not_used() -> None:
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    with pytest.raises(DataError, match=r"judges the samples; found 0\.\d+ .*at least 0\.97"):
        train_classifier(train.images[:64], train.labels[:64], held_out.images, held_out.labels, epochs=1)


def test_it_takes_colour_pictures_of_another_size() -> None:
    classifier = SmallClassifier((3, 12, 16), num_classes=5)
    assert classifier(torch.rand(2, 3, 12, 16)).shape == (2, 5)


def test_distance_to_the_nearest_training_picture() -> None:
    training = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    training[1], training[2] = 255, 51
    pictures = torch.stack([training[1], torch.full((1, 2, 2), 153, dtype=torch.uint8), training[2]])
    assert nearest_training_distance(pictures, training, chunk=2).tolist() == pytest.approx([0.0, 0.8, 0.0])
    assert nearest_training_distance(pictures.float() / 255, training).tolist() == pytest.approx(
        [0.0, 0.8, 0.0], abs=1e-6
    )
