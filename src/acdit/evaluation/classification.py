"""How often a classifier is right: top-1 and top-5 with their intervals."""

from __future__ import annotations

from typing import Any

import torch

from acdit.classifiers import ACDiTClassifier
from acdit.codecs import CachedLatentsCodec
from acdit.data.latents import LatentsDataset
from acdit.errors import ConfigError, DataError
from acdit.evaluation.intervals import wilson_interval
from acdit.processes import Processes


@torch.no_grad()
def measure_accuracy(
    classifier: ACDiTClassifier,
    dataset: Any,
    *,
    batch_size: int = 64,
    count: int | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on a data set of labelled pictures, clips or cached latents.

    Args:
        classifier: on the device where it shall run.
        dataset: a map from index to (sample, class); see `acdit.data.build.Dataset`.
        batch_size: samples at once.
        count: the first so many; None: all.
        processes: this process among its peers; each takes every so-many-th batch.

    Returns:
        "top1" and, of more than five classes, "top5"; each with "…_interval" of 95 % (Wilson); "num_samples".

    Raises:
        ConfigError: other classes than the classifier's, or samples of another size.
        DataError: no samples, or fewer than asked for.
    """
    processes = processes or Processes()
    total = len(dataset) if count is None else count
    if not 0 < total <= len(dataset):
        raise DataError("data", found=f"{len(dataset)} samples", expected=f"at least {max(1, total)}")
    names = classifier.class_names
    if list(dataset.class_names) != names:
        raise ConfigError(
            "data", found=f"classes {', '.join(dataset.class_names[:5])} …", expected=f"{', '.join(names[:5])} …: the "
            "classifier's, in its order", fix="data.classes=FILE gives classes their order",
        )  # fmt: skip
    right = {1: 0, 5: 0}
    for first in list(range(0, total, batch_size))[processes.rank :: processes.size]:
        samples = [dataset[index] for index in range(first, min(first + batch_size, total))]
        data = torch.stack([sample for sample, _ in samples])
        labels = torch.tensor([label for _, label in samples])
        if isinstance(dataset, LatentsDataset):
            transformer = classifier.classifier.transformer
            blocks = transformer.layout.to_blocks(CachedLatentsCodec().encode(data))
            logits = classifier.of_blocks(blocks.to(transformer.x_embedder.weight), first)
        else:
            logits = classifier(data, first)
        order = logits.cpu().topk(min(5, logits.shape[1])).indices == labels[:, None]
        for best in right:
            right[best] += int(order[:, :best].any(dim=1).sum())
    told = processes.gather(right)
    right = {best: sum(one[best] for one in told) for best in right}
    figures: dict[str, Any] = {}
    for best, found in right.items():
        if best < len(names):
            figures[f"top{best}"] = found / total
            figures[f"top{best}_interval"] = list(wilson_interval(found, total))
    return {**figures, "num_samples": total}
