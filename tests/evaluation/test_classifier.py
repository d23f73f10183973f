from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acdit.data import DigitsDataset
from acdit.errors import ConfigError, DataError
from acdit.evaluation import (
    ClassifierFacts,
    ResidualClassifier,
    SmallClassifier,
    load_classifier,
    nearest_training_distance,
    save_classifier,
    train_classifier,
)
from acdit.evaluation.classifier import _augmented
from acdit.evaluation.extractors import ExtractorOptions, build_extractor


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


def test_the_residual_network_learns_real_digits_with_mirroring_and_shifts_off_and_on() -> None:
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    judge, accuracy = train_classifier(
        train.images,
        train.labels,
        held_out.images,
        held_out.labels,
        network="residual",
        epochs=3,
        required_accuracy=0.9,
    )
    assert accuracy >= 0.9
    assert judge.features(held_out.images[:3]).shape == (3, 128)
    # In eval mode a picture's features do not depend on its neighbours in the batch.
    alone, together = judge.features(held_out.images[:1]), judge.features(held_out.images[:7])[:1]
    torch.testing.assert_close(alone, together)


def test_augmented_pictures_are_shifted_mirrored_and_reproducible() -> None:
    pixels = torch.arange(16 * 16, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(64, 1, 1, 1)
    shown = _augmented(pixels, seed=1, step=2)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown, _augmented(pixels, seed=1, step=2))
    assert not torch.equal(shown, _augmented(pixels, seed=1, step=3))
    padded = torch.nn.functional.pad(pixels[:1].float(), (4,) * 4, mode="reflect")[0].to(torch.uint8)
    cuts = {padded[:, top : top + 16, left : left + 16].numpy().tobytes() for top in range(9) for left in range(9)}
    mirrored = [picture.flip(-1).numpy().tobytes() for picture in shown]
    kinds = [(picture.numpy().tobytes() in cuts, back in cuts) for picture, back in zip(shown, mirrored, strict=True)]
    assert {(True, False), (False, True)} == set(kinds)
    assert len({picture.numpy().tobytes() for picture in shown}) > 30


def test_a_saved_classifier_is_an_extractor(tmp_path: Path) -> None:
    classifier = ResidualClassifier((3, 12, 16), num_classes=5, width=16).eval()
    facts = ClassifierFacts("residual", (3, 12, 16), 5, "100 pictures of nothing", 0.5)
    save_classifier(classifier, facts, tmp_path / "judge.safetensors")
    loaded, told = load_classifier(tmp_path / "judge.safetensors")
    pixels = torch.randint(0, 256, (4, 3, 12, 16), dtype=torch.uint8)
    assert told == facts
    assert torch.equal(loaded(pixels), classifier(pixels))
    extractor = build_extractor("classifier", ExtractorOptions(str(tmp_path / "judge.safetensors")))
    features = extractor(pixels)
    assert torch.equal(features.pooled, classifier.features(pixels))
    assert torch.equal(features.probabilities, classifier(pixels).softmax(dim=1))
    described = extractor.describe()
    assert described["weights"] == "judge.safetensors"
    assert "100 pictures of nothing" in str(described["preprocessing"])
    with pytest.raises(ConfigError, match=r"\(3, 8, 8\).*\(3, 12, 16\)"):
        extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("case", ["missing", "another file", "other weights"])
def test_what_is_no_classifier_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    if case == "another file":
        save_file({"x": torch.zeros(1)}, path)
    if case == "other weights":
        facts = ClassifierFacts("residual", (3, 8, 8), 5, "x", 0.5)
        save_classifier(SmallClassifier((3, 8, 8), 5), facts, path)
    expected = {"missing": "no such file", "another file": "acdit_classifier", "other weights": "missing stem.0.weight"}
    with pytest.raises(DataError, match=expected[case]):
        load_classifier(path)


def test_the_extractor_needs_its_file() -> None:
    with pytest.raises(ConfigError, match="--weights"):
        build_extractor("classifier")
    with pytest.raises(ConfigError, match="--preprocessing"):
        build_extractor("classifier", ExtractorOptions("x", "tensorflow"))


def test_distance_to_the_nearest_training_picture() -> None:
    training = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    training[1], training[2] = 255, 51
    pictures = torch.stack([training[1], torch.full((1, 2, 2), 153, dtype=torch.uint8), training[2]])
    assert nearest_training_distance(pictures, training, chunk=2).tolist() == pytest.approx([0.0, 0.8, 0.0])
    assert nearest_training_distance(pictures.float() / 255, training).tolist() == pytest.approx(
        [0.0, 0.8, 0.0], abs=1e-6
    )
