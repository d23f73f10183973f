"""Features of a set of pictures or clips, taken in chunks over processes and kept: a second start reuses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from acdit.chunks import ChunkStore, make_missing
from acdit.errors import DataError, NonFiniteError
from acdit.evaluation.clip_sets import ClipSet
from acdit.evaluation.extractors import Extractor
from acdit.evaluation.image_sets import ImageSet
from acdit.evaluation.statistics import FeatureStatistics, InceptionScore
from acdit.processes import Processes


def extract_features(
    samples: ImageSet | ClipSet,
    extractor: Extractor,
    work: str | Path,
    *,
    count: int | None = None,
    batch_size: int = 64,
    chunk_size: int = 500,
    processes: Processes | None = None,
    device: torch.device | None = None,
    what: str = "features",
    progress: bool = True,
) -> ChunkStore:
    """Features of pictures (or clips) 0 … count − 1, or what is missing of them.

    Args:
        samples: the pictures, or clips: whole for an extractor of clips, frame by frame for one of frames.
        extractor: the function.
        work: folder for all kept features; each pair of pictures and extractor has a folder of its own in it.
        count: None: all.
        batch_size: pictures at once, of clips so many frames and at least one clip.
        chunk_size: pictures that are kept together.
        processes: this process among its peers.
        device: for the extractor.
        what: for the progress bar.
        progress: whether to draw one.

    Returns:
        The store. Its chunks hold "pooled" (n, F) fp32 and, where the extractor gives them, "spatial" (n, S) fp32 and
        "score-<split>", sums of `InceptionScore`. Of clips frame by frame they hold "frames" (n, T, F) fp32 alone.

    Raises:
        ConfigError: pictures for an extractor of clips.
        DataError: fewer pictures than asked for, a bad one, sizes that differ; the file is named.
        NonFiniteError: NaN or infinite features; the picture is named.
    """
    total = len(samples) if count is None else count
    what_they_are = "clips" if samples.kind == "clips" else "pictures"
    if total > len(samples):
        raise DataError(
            str(samples.description.get("name", what_they_are)), found=f"{len(samples)} {what_they_are}",
            expected=f"at least {total}", fix="draw more, or ask for fewer with --num-samples",
        )  # fmt: skip
    at_once = max(1, batch_size // samples.cut.frames) if samples.kind == "clips" else batch_size
    description = {"pictures": samples.description, "extractor": extractor.describe(), "chunk_size": chunk_size}
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    store = ChunkStore(Path(work) / f"features-{key}", description, total, chunk_size)
    device = device or torch.device("cpu")
    extractor.to(device)

    def make(start: int, stop: int) -> Mapping[str, Tensor]:
        cuts = [(first, min(first + at_once, stop)) for first in range(start, stop, at_once)]
        found = [_of_batch(samples, extractor, first, last, device, batch_size) for first, last in cuts]
        chunk = {name: torch.cat([part[name] for part in found]) for name in found[0] if name != "probabilities"}
        if "probabilities" in found[0]:
            score = InceptionScore(found[0]["probabilities"].shape[1])
            for (first, _), part in zip(cuts, found, strict=True):
                score.update(part["probabilities"], first)
            chunk |= {f"score-{split}": sums for split, sums in score.sums.items()}
        return chunk

    make_missing(store, make, processes, what=what, progress=progress)
    return store


def _of_batch(
    samples: ImageSet | ClipSet, extractor: Extractor, start: int, stop: int, device: torch.device, frames: int
) -> dict[str, Tensor]:
    pixels = samples.read(start, stop).to(device)
    if samples.kind == "clips" and extractor.kind == "frames":
        pooled = torch.cat([extractor(part).pooled.float().cpu() for part in pixels.flatten(0, 1).split(frames)])
        found = {"frames": pooled.unflatten(0, pixels.shape[:2])}
    else:
        features = extractor(pixels)
        given = {"pooled": features.pooled, "spatial": features.spatial, "probabilities": features.probabilities}
        found = {name: value.float().cpu() for name, value in given.items() if value is not None}
    for name, value in found.items():
        finite = value.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteError(
                samples.name(start + int((~finite).nonzero()[0])),
                found=f"NaN or infinite features ({name}, extractor {extractor.name})", expected="finite numbers",
                fix="check the extractor's weights and that file",
            )  # fmt: skip
    return found


class FeatureSet:
    """What the metrics need of a finished store, read once, chunk after chunk.

    Args:
        store: of `extract_features`, of pictures or of whole clips.
    """

    def __init__(self, store: ChunkStore) -> None:
        self.count = store.total
        pooled: list[Tensor] = []
        self.spatial: FeatureStatistics | None = None
        self.score: InceptionScore | None = None
        self.statistics: FeatureStatistics | None = None
        for chunk in store:
            pooled.append(chunk["pooled"])
            self.statistics = self.statistics or FeatureStatistics(chunk["pooled"].shape[1])
            self.statistics.update(chunk["pooled"])
            if "spatial" in chunk:
                self.spatial = self.spatial or FeatureStatistics(chunk["spatial"].shape[1])
                self.spatial.update(chunk["spatial"])
            for name, sums in chunk.items():
                if name.startswith("score-"):
                    self.score = self.score or InceptionScore(len(sums) - 2)
                    self.score.add(int(name.removeprefix("score-")), sums)
        self.pooled = torch.cat(pooled)
        """(M, F) fp32, in the order of the pictures."""
