"""Figures of clips: FVD against the closed form, and distances over time by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.evaluation import ClassifierFacts, feature_statistics, frechet_distance, save_classifier
from acdit.evaluation.classifier import build_network
from acdit.evaluation.clip_files import ClipCut
from acdit.evaluation.clip_measure import ClipEvaluator, frame_statistics
from acdit.evaluation.clip_sets import ClipSet, open_clips
from acdit.evaluation.extractors import PIXELS_CLIP, Extractor, ExtractorOptions, build_extractor
from acdit.evaluation.features import extract_features
from acdit.evaluation.image_sets import open_images
from acdit.evaluation.inception import Features
from acdit.evaluation.measure import Evaluator
from acdit.evaluation.reference import Reference, open_reference
from tests.evaluation.clips import npz, random_clips, save_stand_in

CORNER = Extractor("corner", 3, lambda clips: Features(clips[:, 0, :2, 0, 0].float()), kind="clips")
"""Two features a clip: red and green of its first frame's corner."""


class Colours:
    """Mean colour as features; remembers the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Features:
        self.batches.append(len(pixels))
        return Features(pixels.float().mean(dim=(2, 3)))

    def extractor(self) -> Extractor:
        return Extractor("colours", 3, self)


def corners(path: Path, mean: tuple[int, int], reach: tuple[int, int]) -> str:
    """Four clips whose two features are mean ± reach in all combinations: the covariance is diag(reach²) · 4/3."""
    clips = np.zeros((4, 2, 2, 2, 3), dtype=np.uint8)
    for index, (a, b) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
        clips[index, 0, 0, 0, :2] = mean[0] + a * reach[0], mean[1] + b * reach[1]
    return npz(path, arr_0=clips)


def evaluator(reference: str, work: Path, extractor: Extractor, cut: ClipCut, **options: Any) -> Evaluator:
    opened = open_reference(reference, extractor.channels, cut=cut)
    return Evaluator(extractor, opened, work, progress=False, **options)


def measure(
    samples: str, reference: str, work: Path, extractor: Extractor, cut: ClipCut, span: int = 1, **options: Any
) -> dict[str, Any]:
    made = ClipEvaluator(evaluator(reference, work, extractor, cut, **options), span)
    return made.measure(open_clips(samples, cut, extractor.channels))


def test_fvd_is_the_closed_form(tmp_path: Path) -> None:
    ours, theirs = corners(tmp_path / "a.npz", (100, 60), (6, 10)), corners(tmp_path / "b.npz", (90, 80), (12, 5))
    found = measure(ours, theirs, tmp_path, CORNER, ClipCut(2))
    # |μ₁ − μ₂|² + Σ (√s₁ − √s₂)² of diagonal covariances
    expected = 10**2 + 20**2 + 4 / 3 * ((6 - 12) ** 2 + (10 - 5) ** 2)
    assert found["fvd"] == pytest.approx(expected, rel=1e-9)
    assert (found["num_samples"], found["num_reference"], found["frames"], found["feature_dim"]) == (4, 4, 2, 2)
    assert found["frame_frechet"] is found["frame_frechet_over_time"] is None
    assert "clips as wholes" in found["not_measured"]["frame_frechet"]


def test_statistics_as_reference_give_the_same_fvd(tmp_path: Path) -> None:
    ours, theirs = corners(tmp_path / "a.npz", (100, 60), (6, 10)), corners(tmp_path / "b.npz", (90, 80), (12, 5))
    statistics = npz(tmp_path / "s.npz", mu=np.array([90.0, 80.0]), sigma=np.diag([144.0, 25.0]) * 4 / 3)
    clips, alone = (measure(ours, reference, tmp_path, CORNER, ClipCut(2)) for reference in (theirs, statistics))
    assert alone["fvd"] == pytest.approx(clips["fvd"], rel=1e-9)
    assert alone["num_reference"] is alone["precision"] is None
    blind = evaluator(statistics, tmp_path, Colours().extractor(), ClipCut(2))
    with pytest.raises(ConfigError, match="statistics, and an extractor of frames only"):
        ClipEvaluator(blind)  # before anything is drawn or read


def drifting(tmp_path: Path) -> tuple[str, str, Tensor, Tensor]:
    """Reference clips, and the same ones that grow brighter by 10 levels a frame."""
    levels = np.random.default_rng(1).integers(0, 200, (9, 5, 1, 1, 3), dtype=np.uint8)
    reference = np.broadcast_to(levels, (9, 5, 2, 2, 3)).copy()
    samples = reference + 10 * np.arange(5, dtype=np.uint8)[:, None, None, None]
    ours, theirs = (torch.from_numpy(clips[:, :, 0, 0]).double() for clips in (samples, reference))
    return npz(tmp_path / "ours.npz", arr_0=samples), npz(tmp_path / "theirs.npz", arr_0=reference), ours, theirs


def test_drift_is_a_list_over_time(tmp_path: Path) -> None:
    ours, theirs, _, _ = drifting(tmp_path)
    found = measure(ours, theirs, tmp_path, Colours().extractor(), ClipCut(5))
    # Equal covariances, and means that are 10 t apart in each of three features.
    assert found["frame_frechet_over_time"] == pytest.approx([3 * (10 * t) ** 2 for t in range(5)], abs=1e-6)
    assert found["span"] == 1
    assert found["fvd"] is None
    assert "i3d" in found["not_measured"]["fvd"]


def test_spans_and_all_frames_are_the_definitions(tmp_path: Path) -> None:
    ours, theirs, a, b = drifting(tmp_path)
    found = measure(ours, theirs, tmp_path, Colours().extractor(), ClipCut(5), span=2, chunk_size=4)

    def distance(first: int, stop: int) -> float:
        sides = [feature_statistics(side[:, first:stop].reshape(-1, 3)) for side in (a, b)]
        return frechet_distance(*sides[0], *sides[1])

    expected = [distance(0, 2), distance(2, 4), distance(4, 5)]
    assert found["frame_frechet_over_time"] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found["frame_frechet"] == pytest.approx(distance(0, 5), rel=1e-9)
    strided = measure(ours, theirs, tmp_path, Colours().extractor(), ClipCut(2, 3))
    assert strided["frame_frechet_over_time"] == pytest.approx([0, 3 * 30**2], abs=1e-6)


def test_frames_features_are_kept_reused_and_taken_in_batches_of_frames(tmp_path: Path) -> None:
    ours, _, a, _ = drifting(tmp_path)
    colours, cut = Colours(), ClipCut(5)
    clips = open_clips(ours, cut, 3)
    store = extract_features(clips, colours.extractor(), tmp_path, batch_size=11, chunk_size=4, progress=False)
    assert max(colours.batches) == 10  # two whole clips
    assert sum(colours.batches) == 45
    assert torch.equal(torch.cat([chunk["frames"] for chunk in store]), a.float())
    few = Colours()
    extract_features(clips, few.extractor(), tmp_path / "few", batch_size=3, progress=False)
    assert max(few.batches) == 3  # a clip alone may be more than a batch
    statistics = frame_statistics(store, 1, 3)
    mean, covariance = feature_statistics(a[:, 1:3].reshape(-1, 3))
    assert torch.allclose(statistics.mean, mean)
    assert torch.allclose(statistics.covariance, covariance)
    again = Colours()
    extract_features(clips, again.extractor(), tmp_path, chunk_size=4, progress=False)
    assert not again.batches
    other = Colours()  # other frames of the same file are other samples
    extract_features(open_clips(ours, ClipCut(2), 3), other.extractor(), tmp_path, chunk_size=4, progress=False)
    assert sum(other.batches) == 18


def test_pixels_see_clips_as_wholes_and_frame_by_frame(tmp_path: Path) -> None:
    clips = random_clips(12, 3, 4, 4)
    ours, theirs = npz(tmp_path / "a.npz", arr_0=clips), npz(tmp_path / "b.npz", arr_0=255 - clips)
    found = measure(ours, theirs, tmp_path, build_extractor("pixels"), ClipCut(3))
    assert found["feature_dim"] == 3 * 3 * 4 * 4
    assert found["frame_feature_dim"] == 3 * 4 * 4
    assert min(found["fvd"], found["frame_frechet"], *found["frame_frechet_over_time"]) > 0
    assert len(found["frame_frechet_over_time"]) == 3
    assert any("12 frames a span for 48 features" in warning for warning in found["warnings"])
    same = measure(ours, ours, tmp_path, build_extractor("pixels"), ClipCut(3))
    assert abs(same["fvd"]) < 1e-5
    assert max(map(abs, same["frame_frechet_over_time"])) < 1e-5


def test_pixels_of_clips_are_means_over_cells() -> None:
    clips = random_clips(12, 8, 16, 16)
    whole = build_extractor("pixels").of_clips
    assert whole is not None
    cells = whole(torch.from_numpy(clips).movedim(-1, 2)).pooled.reshape(12, 3, *PIXELS_CLIP)
    expected = clips[5, 2:4, 4:6, 6:8, 1].mean() / 255  # the second of 4, third and fourth of 8 cells
    assert float(cells[5, 1, 1, 2, 3]) == pytest.approx(expected, rel=1e-5)
    assert whole(torch.zeros(1, 2, 3, 5, 20, dtype=torch.uint8)).pooled.shape == (1, 3 * 2 * 5 * 8)


def test_a_saved_classifier_measures_frames(tmp_path: Path) -> None:
    classifier = build_network("small", (1, 8, 8), 10).eval()
    save_classifier(classifier, ClassifierFacts("small", (1, 8, 8), 10, "nothing", 0.1), tmp_path / "judge.safetensors")
    extractor = build_extractor("classifier", ExtractorOptions(str(tmp_path / "judge.safetensors")))
    clips = random_clips(6, 3, 8, 8, 1)
    ours, theirs = npz(tmp_path / "a.npz", arr_0=clips), npz(tmp_path / "b.npz", arr_0=clips[:, ::-1])
    found = measure(ours, theirs, tmp_path, extractor, ClipCut(3))
    first = [
        classifier.features(torch.from_numpy(side[:, 0]).movedim(-1, 1)).detach() for side in (clips, clips[:, ::-1])
    ]
    sides = [feature_statistics(features) for features in first]
    expected = frechet_distance(*sides[0], *sides[1])
    assert found["frame_frechet_over_time"][0] == pytest.approx(expected, rel=1e-3)
    assert found["frame_frechet"] == pytest.approx(0, abs=1e-6)  # the same frames in another order


def test_i3d_measures_clips_as_wholes_and_says_what_to_think_of_it(tmp_path: Path) -> None:
    extractor = build_extractor("i3d", ExtractorOptions(save_stand_in(tmp_path / "i3d_torchscript.pt")))
    clips = random_clips(5, 9, 8, 8)
    ours, theirs = npz(tmp_path / "a.npz", arr_0=clips), npz(tmp_path / "b.npz", arr_0=clips // 2)
    found = measure(ours, theirs, tmp_path, extractor, ClipCut(9), batch_size=18)
    sides = [
        feature_statistics(extractor(torch.from_numpy(side).movedim(-1, 2)).pooled) for side in (clips, clips // 2)
    ]
    assert found["fvd"] == pytest.approx(frechet_distance(*sides[0], *sides[1]), rel=1e-3)
    assert found["feature_dim"] == 400
    assert any("published FVDs take 2048" in warning for warning in found["warnings"])
    with pytest.raises(ConfigError, match=r"--frames; found 8, --extractor i3d; expected at least 9"):
        ClipEvaluator(evaluator(theirs, tmp_path, extractor, ClipCut(8)))


WRONG = {
    "clips for the evaluator of pictures": ("clips", "colours", ConfigError, "ClipEvaluator"),
    "pictures for an extractor of clips": ("pictures", "corner", ConfigError, "corner; found pictures as samples"),
    "pictures for the evaluator of clips": ("pictures of clips", "colours", ConfigError, "expected clips"),
    "too many asked for": ("too many", "colours", DataError, "found 9 clips; expected at least 10"),
    "no number": ("nan", "colours", NonFiniteError, r"arr_0\[4\]; found NaN or infinite features \(frames"),
    "other frames than the reference": ("other frames", "colours", ConfigError, "as the reference has"),
    "pictures as reference": ("pictures as reference", "colours", ConfigError, "reference; found pictures"),
    "no span": ("span", "colours", ConfigError, "--span"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str, tmp_path: Path) -> None:
    what, extractor_name, error, message = WRONG[name]
    ours, theirs, _, _ = drifting(tmp_path)
    extractor = CORNER if extractor_name == "corner" else Colours().extractor()
    if what == "nan":

        def features(pixels: Tensor) -> Features:
            return Features(torch.where(pixels == 255, torch.nan, pixels.float()).mean(dim=(2, 3)))

        extractor = Extractor("colours", 3, features)
        clips = np.zeros((9, 5, 2, 2, 3), np.uint8)
        clips[4, 2] = 255
        ours = npz(tmp_path / "white.npz", arr_0=clips)
    made = evaluator(theirs, tmp_path / "work", extractor, ClipCut(5))
    clips_given: ClipSet = open_clips(ours, ClipCut(5), 3)
    pictures: Any = open_images("digits:held_out", 3)
    attempts: dict[str, Callable[[], Any]] = {
        "clips": lambda: made.measure(clips_given),
        "pictures": lambda: made.measure(pictures),
        "pictures of clips": lambda: ClipEvaluator(made).measure(pictures),
        "other frames": lambda: ClipEvaluator(made).measure(open_clips(ours, ClipCut(4), 3)),
        "pictures as reference": lambda: ClipEvaluator(Evaluator(extractor, Reference("r", pictures), tmp_path)),
        "span": lambda: ClipEvaluator(made, 0),
        "too many": lambda: ClipEvaluator(made).measure(clips_given, 10),
        "nan": lambda: ClipEvaluator(made).measure(clips_given),
    }
    with pytest.raises(error, match=message):
        attempts[what]()
