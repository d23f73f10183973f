"""Features kept in chunks, and the figures made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from acdit.errors import AcditError, DataError, NonFiniteError
from acdit.evaluation import feature_statistics, frechet_distance
from acdit.evaluation.extractors import Extractor, build_extractor
from acdit.evaluation.features import FeatureSet, extract_features
from acdit.evaluation.image_sets import open_images
from acdit.evaluation.inception import Features
from acdit.evaluation.measure import METRICS, Evaluator
from acdit.evaluation.reference import Reference, open_reference
from acdit.evaluation.self_test import self_test

RNG = np.random.default_rng(0)


class Counting:
    """Pixels' means as features; counts the pictures it was given, dies at a batch, or answers NaN for black ones."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.seen, self.dies_at = 0, dies_at

    def __call__(self, pixels: torch.Tensor) -> Features:
        if self.seen == self.dies_at:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        values = pixels.float().mean(dim=(2, 3)) / 255
        values = torch.where((pixels != 0).flatten(1).any(dim=1)[:, None], values, torch.nan)
        return Features(values, values[:, :2] ** 2, values.softmax(dim=1))

    def extractor(self) -> Extractor:
        return Extractor("counting", 3, self)


def batch(path: Path, count: int = 30, low: int = 1) -> str:
    np.savez(path, arr_0=RNG.integers(low, 256, (count, 4, 4, 3), dtype=np.uint8))
    return str(path)


def test_features_are_kept_after_a_kill_and_reused(tmp_path: Path) -> None:
    images = open_images(batch(tmp_path / "a.npz"), 3)
    dying, again, third = Counting(dies_at=20), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        extract_features(images, dying.extractor(), tmp_path, batch_size=5, chunk_size=10, progress=False)
    store = extract_features(images, again.extractor(), tmp_path, batch_size=5, chunk_size=10, progress=False)
    assert again.seen == 10
    extract_features(images, third.extractor(), tmp_path, batch_size=5, chunk_size=10, progress=False)
    assert third.seen == 0
    features = FeatureSet(store)
    whole = Counting()(images.read(0, 30))
    assert torch.equal(features.pooled, whole.pooled)
    mean, covariance = feature_statistics(whole.spatial)
    assert torch.allclose(features.spatial.mean, mean)
    assert torch.allclose(features.spatial.covariance, covariance)
    # Other pictures or another extractor are not taken for these.
    other = Counting()
    extract_features(open_images(batch(tmp_path / "b.npz"), 3), other.extractor(), tmp_path, progress=False)
    assert other.seen == 30


def test_figures_are_the_definitions(tmp_path: Path) -> None:
    ours, theirs = batch(tmp_path / "ours.npz", 40), batch(tmp_path / "theirs.npz", 50, low=60)
    evaluator = Evaluator(Counting().extractor(), open_reference(theirs, 3), tmp_path, progress=False)
    found = evaluator.measure(open_images(ours, 3))
    a, b = (Counting()(open_images(where, 3).read(0, count)) for where, count in ((ours, 40), (theirs, 50)))
    for name, kind in (("fid", "pooled"), ("sfid", "spatial")):
        sides = [*feature_statistics(getattr(a, kind)), *feature_statistics(getattr(b, kind))]
        assert found[name] == pytest.approx(frechet_distance(*sides), rel=1e-9), name
    assert found["not_measured"] == {}
    assert (found["num_samples"], found["num_reference"]) == (40, 50)
    assert 1 < found["inception_score"] < 3
    assert 0 < found["precision"] < 1
    first = evaluator.measure(open_images(ours, 3), 20)
    assert first["num_samples"] == 20
    assert first["fid"] != found["fid"]


def test_statistics_as_reference_give_the_same_distance_and_no_precision(tmp_path: Path) -> None:
    ours, theirs = batch(tmp_path / "ours.npz"), batch(tmp_path / "theirs.npz", 50)
    features = Counting()(open_images(theirs, 3).read(0, 50))
    mean, covariance = feature_statistics(features.pooled)
    np.savez(tmp_path / "statistics.npz", mu=mean.numpy(), sigma=covariance.numpy())
    pictures, statistics = (
        Evaluator(Counting().extractor(), open_reference(str(where), 3), tmp_path, progress=False).measure(
            open_images(ours, 3)
        )
        for where in (theirs, tmp_path / "statistics.npz")
    )
    assert statistics["fid"] == pytest.approx(pictures["fid"], rel=1e-9)
    assert statistics["precision"] is statistics["recall"] is statistics["sfid"] is None
    assert "mu_s" in statistics["not_measured"]["sfid"]
    assert "no pictures" in statistics["not_measured"]["precision"]


def test_what_an_extractor_does_not_give_is_not_measured_and_said(tmp_path: Path) -> None:
    evaluator = Evaluator(build_extractor("pixels"), open_reference("digits:held_out", 3), tmp_path, progress=False)
    found = evaluator.measure(open_images("digits:train", 3), 100)
    assert found["sfid"] is found["inception_score"] is None
    assert "no spatial features" in found["not_measured"]["sfid"]
    assert any("100 samples for 192 features" in warning for warning in found["warnings"])


def test_too_few_pictures_wrong_statistics_and_bad_features_are_named(tmp_path: Path) -> None:
    images = open_images(batch(tmp_path / "a.npz"), 3)
    extractor = Counting().extractor()
    with pytest.raises(DataError, match=r"a\.npz; found 30 pictures; expected at least 31"):
        extract_features(images, extractor, tmp_path, count=31, progress=False)
    wide = Reference("r", statistics={"pooled": (torch.zeros(9), torch.eye(9))})
    with pytest.raises(DataError, match="statistics of 9 features; expected 3"):
        Evaluator(extractor, wide, tmp_path, progress=False).measure(images)
    pictures = np.full((9, 4, 4, 3), 7, np.uint8)
    pictures[6] = 0
    np.savez(tmp_path / "black.npz", arr_0=pictures)
    with pytest.raises(NonFiniteError, match=r"black\.npz: arr_0\[6\]; found NaN or infinite features \(pooled"):
        extract_features(open_images(str(tmp_path / "black.npz"), 3), extractor, tmp_path, batch_size=4, progress=False)


def test_the_self_test_passes_with_a_sane_extractor_and_fails_with_others(tmp_path: Path) -> None:
    result = self_test(build_extractor("pixels"), tmp_path / "a", progress=False)
    distances = [row["fid"] for row in result["noise"]]
    assert abs(result["real_against_real"]["fid"]) < 1e-6
    assert distances == sorted(distances)
    assert 0 < result["held_out_against_real"]["fid"] < distances[-1]
    assert set(METRICS) <= set(result["noise"][0])
    blind = Extractor("blind", 3, lambda pixels: Features(torch.linspace(0, 1, len(pixels))[:, None].expand(-1, 2)))
    with pytest.raises(AcditError, match="growing noise"):
        self_test(blind, tmp_path / "b", progress=False)
