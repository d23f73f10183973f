"""Features of a set of pictures, taken in chunks over processes and kept, so that a second start reuses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from acdit.chunks import ChunkStore, make_missing
from acdit.errors import DataError, NonFiniteError
from acdit.evaluation.extractors import Extractor
from acdit.evaluation.image_sets import ImageSet
from acdit.evaluation.statistics import FeatureStatistics, InceptionScore
from acdit.processes import Processes


def extract_features(
    images: ImageSet,
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
    """Features of pictures 0 … count − 1, or what is missing of them.

    Args:
        images: the pictures.
        extractor: the function.
        work: folder for all kept features; each pair of pictures and extractor has a folder of its own in it.
        count: None: all.
        batch_size: pictures at once.
        chunk_size: pictures that are kept together.
        processes: this process among its peers.
        device: for the extractor.
        what: for the progress bar.
        progress: whether to draw one.

    Returns:
        The store. Its chunks hold "pooled" (n, F) fp32 and, where the extractor gives them, "spatial" (n, S) fp32 and
        "score-<split>", sums of `InceptionScore`.

    Raises:
        DataError: fewer pictures than asked for, a bad one, sizes that differ; the file is named.
        NonFiniteError: NaN or infinite features; the picture is named.
    """
    total = len(images) if count is None else count
    if total > len(images):
        raise DataError(
            str(images.description.get("name", "pictures")), found=f"{len(images)} pictures",
            expected=f"at least {total}", fix="draw more, or ask for fewer with --num-samples",
        )  # fmt: skip
    description = {"pictures": images.description, "extractor": extractor.describe(), "chunk_size": chunk_size}
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    store = ChunkStore(Path(work) / f"features-{key}", description, total, chunk_size)
    device = device or torch.device("cpu")
    extractor.to(device)

    def make(start: int, stop: int) -> Mapping[str, Tensor]:
        cuts = [(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]
        found = [_of_batch(images, extractor, first, last, device) for first, last in cuts]
        chunk = {"pooled": torch.cat([part["pooled"] for part in found])}
        if "spatial" in found[0]:
            chunk["spatial"] = torch.cat([part["spatial"] for part in found])
        if "probabilities" in found[0]:
            score = InceptionScore(found[0]["probabilities"].shape[1])
            for (first, _), part in zip(cuts, found, strict=True):
                score.update(part["probabilities"], first)
            chunk |= {f"score-{split}": sums for split, sums in score.sums.items()}
        return chunk

    make_missing(store, make, processes, what=what, progress=progress)
    return store


def _of_batch(images: ImageSet, extractor: Extractor, start: int, stop: int, device: torch.device) -> dict[str, Tensor]:
    features = extractor(images.read(start, stop).to(device))
    given = {"pooled": features.pooled, "spatial": features.spatial, "probabilities": features.probabilities}
    found = {name: value.float().cpu() for name, value in given.items() if value is not None}
    for name, value in found.items():
        finite = value.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteError(
                images.name(start + int((~finite).nonzero()[0])),
                found=f"NaN or infinite features ({name}, extractor {extractor.name})", expected="finite numbers",
                fix="check the extractor's weights and that picture",
            )  # fmt: skip
    return found


class FeatureSet:
    """What the metrics need of a finished store, read once, chunk after chunk.

    Args:
        store: of `extract_features`.
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
