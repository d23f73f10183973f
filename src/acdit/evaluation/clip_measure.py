"""Figures of clips against reference clips: as wholes (FVD, precision, recall), and frame by frame, over time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from acdit.chunks import ChunkStore
from acdit.errors import ConfigError
from acdit.evaluation.clip_sets import ClipSet
from acdit.evaluation.extractors import Extractor
from acdit.evaluation.frechet import frechet_distance
from acdit.evaluation.i3d_weights import ScriptedI3D
from acdit.evaluation.measure import Evaluator
from acdit.evaluation.statistics import FeatureStatistics

CLIP_PROTOCOL = (
    "the first frames of each clip; FVD: Fréchet distance of clip features (fp64, unbiased covariances); precision and "
    "recall with k = 3 on them; frame_frechet: Fréchet distance of the features of all frames; "
    "frame_frechet_over_time: the same of each span of frames against the reference's same span"
)
CLIP_METRICS = ("fvd", "precision", "recall", "frame_frechet")
_USUAL = 2048  # clips of a published FVD, StyleGAN-V's fvd2048_16f


@dataclass(frozen=True)
class ClipEvaluator:
    """How clips are measured.

    Args:
        evaluator: with a reference of clips, and the extractor: one of clips measures them as wholes, one of frames
            frame by frame (and as wholes by its `of_clips`, where it has one).
        span: frames that a figure over time is of; those of a model's block, for instance.

    Raises:
        ConfigError: clips too short for the extractor, a span of less than a frame, pictures as reference, or
            statistics as reference for an extractor that sees frames only: nothing could be measured.
    """

    evaluator: Evaluator
    span: int = 1

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ConfigError("--span", found=str(self.span), expected="at least one frame")
        reference, extractor = self.evaluator.reference.images, self.evaluator.extractor
        if reference is None:
            if extractor.kind == "frames" and extractor.of_clips is None:
                raise ConfigError(
                    f"--extractor {extractor.name}", found="a reference of statistics, and an extractor of frames only",
                    expected="clips as reference, or an extractor of clips (i3d, pixels)",
                )  # fmt: skip
        elif reference.kind != "clips":
            raise ConfigError("reference", found="pictures", expected="clips", fix="open_reference(…, cut=ClipCut(…))")
        else:
            extractor.require_frames(reference.cut.frames)

    def measure(self, samples: ClipSet, count: int | None = None) -> dict[str, Any]:
        """Measure clips 0 … count − 1.

        Returns:
            On the first process the figures by name: "fvd", "precision", "recall" of whole clips; "frame_frechet" of
            all frames and "frame_frechet_over_time", a list over spans of `span` frames (a span at the end may be
            shorter); `not_measured` with a reason a missing one, counts, warnings. On the others an empty dict.

        Raises:
            ConfigError: pictures instead of clips, clips too short for the extractor, or other frames than the
                reference's.
            DataError: too few clips, a bad one, or features that do not fit the reference's.
            NonFiniteError: NaN or infinite features; the clip is named.
        """
        extractor = self.evaluator.extractor
        if samples.kind != "clips":
            raise ConfigError("samples", found="pictures", expected="clips", fix="leave --frames out")
        reference = self.evaluator.reference.images
        if reference is not None and reference.kind == "clips" and reference.cut != samples.cut:
            raise ConfigError("samples", found=f"{samples.cut}", expected=f"{reference.cut}, as the reference has")
        extractor.require_frames(samples.cut.frames)
        whole = extractor if extractor.kind == "clips" else extractor.of_clips
        figures: dict[str, Any] = {
            **dict.fromkeys(CLIP_METRICS), "frame_frechet_over_time": None, "span": self.span, "not_measured": {},
            **samples.cut.describe(), "num_samples": len(samples) if count is None else count, "warnings": [],
        }  # fmt: skip
        figures["num_reference"] = None if reference is None else len(reference)
        parts = [
            self._whole(whole, samples, count),
            self._frame_by_frame(samples, count) if extractor.kind == "frames" else _no_frames(extractor),
        ]
        if not self.evaluator.processes.is_first:
            return {}
        for part in parts:
            figures["not_measured"] |= part.pop("not_measured", {})
            figures["warnings"] += part.pop("warnings", [])
            figures |= part
        return figures

    def _whole(self, extractor: Extractor | None, samples: ClipSet, count: int | None) -> dict[str, Any]:
        if extractor is None:
            reason = f"the extractor {self.evaluator.extractor.name} sees frames, not clips as wholes: i3d does"
            return {"not_measured": dict.fromkeys(("fvd", "precision", "recall"), reason)}
        found = dataclasses.replace(self.evaluator, extractor=extractor).measure(samples, count)
        if not found:
            return {}
        missing = {name: why for name, why in found["not_measured"].items() if name in CLIP_METRICS}
        return {
            "fvd": found["fid"], "precision": found["precision"], "recall": found["recall"], "not_measured": missing,
            "feature_dim": found["feature_dim"], "warnings": found["warnings"] + self._warnings(extractor, found),
        }  # fmt: skip

    def _warnings(self, extractor: Extractor, found: dict[str, Any]) -> list[str]:
        if extractor.name != "i3d":
            return []
        warnings = []
        if found["num_samples"] < _USUAL:
            warnings.append(f"{found['num_samples']} clips: published FVDs take {_USUAL}; FVD of fewer is higher")
        if not isinstance(extractor.network, ScriptedI3D):
            warnings.append(
                "weights of a state dict: published FVDs take those of i3d_torchscript.pt, which are others"
            )
        return warnings

    def _frame_by_frame(self, samples: ClipSet, count: int | None) -> dict[str, Any]:
        reference = self.evaluator.reference.images
        if reference is None:
            reason = "the reference has statistics only, no clips (arr_0)"
            return {"not_measured": dict.fromkeys(("frame_frechet", "frame_frechet_over_time"), reason)}
        stores = (
            self.evaluator.extract(samples, count, "sample frames"),
            self.evaluator.extract(reference, None, "reference frames"),
        )
        if not self.evaluator.processes.is_first:
            return {}
        totals: tuple[FeatureStatistics, ...] = ()
        over_time = []
        for first in range(0, samples.cut.frames, self.span):
            sides = tuple(frame_statistics(store, first, first + self.span) for store in stores)
            over_time.append(_distance(*sides))
            totals = totals or tuple(FeatureStatistics(side.dim) for side in sides)
            for total, side in zip(totals, sides, strict=True):
                total.merge(side)
        return {
            "frame_frechet": _distance(*totals), "frame_frechet_over_time": over_time,
            "frame_feature_dim": totals[0].dim, "warnings": self._frame_warnings(stores, totals[0].dim),
        }  # fmt: skip

    def _frame_warnings(self, stores: tuple[ChunkStore, ...], width: int) -> list[str]:
        fewest = min(store.total for store in stores) * self.span
        if fewest > width:
            return []
        return [
            f"{fewest} frames a span for {width} features: covariances over time are singular, distances biased "
            "upwards, at all times alike; --span N takes more frames together"
        ]


def frame_statistics(store: ChunkStore, first: int, stop: int) -> FeatureStatistics:
    """Of the frames first … stop − 1 of all clips in a store of frames' features; a chunk in memory at a time."""
    statistics: FeatureStatistics | None = None
    for chunk in store:
        frames = chunk["frames"][:, first:stop].flatten(0, 1)
        statistics = statistics or FeatureStatistics(frames.shape[1])
        statistics.update(frames)
    assert statistics is not None  # a store has at least one clip
    return statistics


def _distance(ours: FeatureStatistics, theirs: FeatureStatistics) -> float:
    return frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)


def _no_frames(extractor: Extractor) -> dict[str, Any]:
    reason = f"the extractor {extractor.name} sees clips as wholes: an extractor of frames (inception, …) does this"
    return {"not_measured": dict.fromkeys(("frame_frechet", "frame_frechet_over_time"), reason)}
