"""What is in a data set, found by looking at some of it: for people, before they train."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from acdit.data.build import Dataset, length
from acdit.data.labelled import LabelledFiles
from acdit.data.latents import LatentsDataset
from acdit.data.stream import StreamDataset


@dataclass(frozen=True)
class Summary:
    """A data set in figures."""

    samples: int | None
    """None: a stream."""
    shape: tuple[int, ...]
    """(C, [T,] H, W) of every sample, after resize and crop."""
    class_names: list[str]
    class_sizes: tuple[int, int] | None
    """Samples of the smallest and the largest class; None where only reading everything would tell."""
    looked_at: int
    """How many samples the figures below are of."""
    mean: list[float]
    """Per channel; pixels count from 0 to 1, latents as they are in model space."""
    std: list[float]
    stored: tuple[tuple[int, int], tuple[int, int]] | None
    """(H, W) of the smallest and the largest picture or frame as it lies in its file, by area."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Bad files among those looked at, with reasons, in the order of the data set."""


def summarize(dataset: Dataset | StreamDataset, at_most: int | None = 1000) -> Summary:
    """Look at evenly spaced samples (the first ones of a stream).

    Args:
        dataset: its limit of bad files is lifted: they are listed, not counted.
        at_most: how many samples to read; None reads all (1000 of a stream).

    Raises:
        DataError: what the data set refuses whatever the limit: pictures of different sizes without data.size, a class
            without a readable picture.
    """
    if hasattr(dataset, "bad_files"):
        dataset.bad_files.limit = sys.maxsize
    samples = length(dataset)
    if isinstance(dataset, StreamDataset):
        chosen = np.arange(at_most or 1000)
        dataset.start(seed=0, history=0)
    else:
        assert samples is not None
        chosen = np.unique(np.linspace(0, samples - 1, min(samples, at_most or samples)).round().astype(np.int64))
    total, squares, pixels = torch.zeros(0), torch.zeros(0), 0
    edges: list[tuple[int, int]] = []
    for index in map(int, chosen):
        picture = dataset.samples([(index, None)])[0][0] if isinstance(dataset, StreamDataset) else dataset[index][0]
        if isinstance(dataset, LatentsDataset):
            picture = picture[0, 0]  # the picture as it is, its latent or its posterior's mean
        values = picture.double().flatten(1) / (255 if picture.dtype == torch.uint8 else 1)
        if not pixels:
            total = squares = values.new_zeros(len(values))
        total, squares, pixels = total + values.sum(1), squares + values.square().sum(1), pixels + values.shape[1]
        if isinstance(dataset, LabelledFiles) and (size := dataset.stored_size(index)) is not None:
            edges.append(size)
    mean = total / pixels
    counts = _class_counts(dataset)
    edges.sort(key=lambda size: (size[0] * size[1], size))
    return Summary(
        samples=samples,
        shape=dataset.shape,
        class_names=list(dataset.class_names),
        class_sizes=None if counts is None else (int(counts.min()), int(counts.max())),
        looked_at=len(chosen),
        mean=mean.tolist(),
        std=(squares / pixels - mean.square()).clamp_min(0).sqrt().tolist(),
        stored=(edges[0], edges[-1]) if edges else None,
        bad_files=dict(dataset.bad_files.reasons) if hasattr(dataset, "bad_files") else {},
    )


def _class_counts(dataset: Dataset | StreamDataset) -> Tensor | None:
    labels = getattr(dataset, "labels", None)
    return None if labels is None else torch.bincount(torch.as_tensor(labels), minlength=dataset.num_classes)
