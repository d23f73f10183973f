"""FID, sFID, Inception Score, precision and recall of pictures against a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdit.chunks import ChunkStore
from acdit.errors import ConfigError, DataError
from acdit.evaluation.clip_sets import ClipSet
from acdit.evaluation.extractors import Extractor
from acdit.evaluation.features import FeatureSet, extract_features
from acdit.evaluation.frechet import frechet_distance
from acdit.evaluation.image_sets import ImageSet
from acdit.evaluation.precision_recall import precision_recall
from acdit.evaluation.reference import Reference
from acdit.processes import Processes

NEIGHBOUR = 3
PROTOCOL = (
    "ADM's: FID of pooled and sFID of spatial features (Fréchet distance in fp64, unbiased covariances); Inception "
    "Score as the mean over splits of 5,000 pictures; precision and recall with k = 3 on pooled features"
)
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
_FEW = 10_000


@dataclass(frozen=True)
class Evaluator:
    """How pictures are measured.

    Args:
        extractor: features come from it.
        reference: what is compared with.
        work: folder where features are kept.
        batch_size, chunk_size: of the extraction.
        processes: this process among its peers.
        device: for the extractor.
        progress: whether to draw progress bars.
    """

    extractor: Extractor
    reference: Reference
    work: Path
    batch_size: int = 64
    chunk_size: int = 500
    processes: Processes = Processes()  # noqa: RUF009 (a frozen value)
    device: torch.device | None = None
    progress: bool = True

    def measure(self, samples: ImageSet | ClipSet, count: int | None = None) -> dict[str, Any]:
        """Measure pictures 0 … count − 1, or clips as wholes.

        Returns:
            On the first process the figures by name, `not_measured` with a reason a missing one, counts and warnings;
            on the others an empty dict.

        Raises:
            ConfigError: pictures for an extractor of clips, or clips for one of frames (see `ClipEvaluator`).
            DataError: too few pictures, a bad one, or features that do not fit the reference's.
            NonFiniteError: NaN or infinite features; the picture is named.
        """
        self._require_kind(samples, "samples")
        if self.reference.images is not None:
            self._require_kind(self.reference.images, "the reference")
        samples_store = self.extract(samples, count, "sample features")
        reference_store = None
        if self.reference.images is not None:
            reference_store = self.extract(self.reference.images, None, "reference features")
        if not self.processes.is_first:
            return {}
        return self._figures(FeatureSet(samples_store), reference_store)

    def _require_kind(self, samples: ImageSet | ClipSet, what: str) -> None:
        if samples.kind != self.extractor.kind:
            given = "clips" if samples.kind == "clips" else "pictures"
            raise ConfigError(
                f"--extractor {self.extractor.name}", found=f"{given} as {what}", expected=f"{self.extractor.kind}",
                fix="ClipEvaluator measures clips frame by frame" if given == "clips" else "an extractor of frames",
            )  # fmt: skip

    def extract(self, samples: ImageSet | ClipSet, count: int | None, what: str) -> ChunkStore:
        """Features by the extractor, kept in the work folder; see `extract_features`."""
        return extract_features(
            samples, self.extractor, self.work, count=count, batch_size=self.batch_size, chunk_size=self.chunk_size,
            processes=self.processes, device=self.device, what=what, progress=self.progress,
        )  # fmt: skip

    def _figures(self, samples: FeatureSet, reference_store: ChunkStore | None) -> dict[str, Any]:
        reference = None if reference_store is None else FeatureSet(reference_store)
        values: dict[str, float | None] = dict.fromkeys(METRICS)
        missing: dict[str, str] = {}
        assert samples.statistics is not None  # a store has at least one picture
        ours = (samples.statistics.mean, samples.statistics.covariance)
        values["fid"] = frechet_distance(*ours, *self._fitting("pooled", ours[0], reference))
        if samples.spatial is None:
            missing["sfid"] = f"the extractor {self.extractor.name} gives no spatial features"
        elif "spatial" not in self.reference.statistics and reference is None:
            missing["sfid"] = "the reference has no mu_s and sigma_s"
        else:
            spatial = (samples.spatial.mean, samples.spatial.covariance)
            values["sfid"] = frechet_distance(*spatial, *self._fitting("spatial", spatial[0], reference))
        if samples.score is None:
            missing["inception_score"] = f"the extractor {self.extractor.name} gives no class probabilities"
        else:
            values["inception_score"] = samples.score.value()
        if reference is None:
            missing["precision"] = missing["recall"] = "the reference has statistics only, no pictures (arr_0)"
        elif min(samples.count, reference.count) <= NEIGHBOUR:
            missing["precision"] = missing["recall"] = f"fewer than {NEIGHBOUR + 1} pictures on a side"
        else:
            values["precision"], values["recall"] = precision_recall(samples.pooled, reference.pooled, NEIGHBOUR)
        return {
            **values,
            "not_measured": missing,
            "num_samples": samples.count,
            "num_reference": None if reference is None else reference.count,
            "feature_dim": samples.pooled.shape[1],
            "warnings": self._warnings(samples, reference),
        }

    def _fitting(self, kind: str, ours: Tensor, reference: FeatureSet | None) -> tuple[Tensor, Tensor]:
        """The reference's mean and covariance of a kind of features, as long as ours."""
        if kind in self.reference.statistics:
            mean, covariance = self.reference.statistics[kind]
        else:
            found = None if reference is None else (reference.spatial if kind == "spatial" else reference.statistics)
            assert found is not None  # reference pictures have what samples have; a reference has one or the other
            mean, covariance = found.mean, found.covariance
        if len(mean) != len(ours):
            raise DataError(
                f"reference {self.reference.name}", found=f"{kind} statistics of {len(mean)} features",
                expected=f"{len(ours)}, as the extractor {self.extractor.name} gives",
                fix="the extractor that made the reference, or a reference of pictures of the samples' size",
            )  # fmt: skip
        return mean, covariance

    def _warnings(self, samples: FeatureSet, reference: FeatureSet | None) -> list[str]:
        warnings = []
        width = samples.pooled.shape[1]
        for name, side in (("samples", samples), ("reference pictures", reference)):
            if side is not None and side.count <= width:
                warnings.append(
                    f"{side.count} {name} for {width} features: the covariance is singular, the distance biased upwards"
                )
        if self.extractor.name == "inception" and samples.count < _FEW:
            warnings.append(f"{samples.count} samples: published figures take 50,000; FID of fewer is higher")
        if self.reference.statistics and "pytorch-fid" in (self.extractor.preprocessing or ""):
            warnings.append("ADM's statistics were made with TensorFlow's resize: --preprocessing tensorflow fits them")
        return warnings
