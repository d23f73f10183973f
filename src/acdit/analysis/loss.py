"""The loss and the bound of a trained model on a split of data: which blocks are hard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdit import draws
from acdit.codecs import PixelCodec
from acdit.corruption import GaussianCorruption
from acdit.data.build import as_measured, build_dataset
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError, DataError
from acdit.evaluation.likelihood import Batch, BoundTerms, EightBit, GaussianBound, gaussian_bound, loss_over_timesteps
from acdit.model_folder import recipe_to_measure, require_whole
from acdit.training.build import build_corruption, load_pipeline
from acdit.training.codecs import build_codec, data_shape


@dataclass(frozen=True)
class Found:
    """What was measured."""

    bound: GaussianBound | None
    no_bound_because: str | None
    timesteps: Tensor
    """(K,)."""
    loss: Tensor
    """(K, N), the training loss without weights."""
    error: Tensor
    """(K, N), its standard error over the samples."""
    settings: dict[str, Any]


def measure_loss(
    model: str,
    data: str | None,
    overrides: Sequence[str],
    *,
    labelled: bool,
    variance: str,
    clip: bool,
    num_timesteps: int,
    num_draws: int,
    num_points: int,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Found:
    """Measure a saved pipeline on data.

    Args:
        model: its folder.
        data: a recipe; None: the one beside the folder, with another split named in `overrides`.
        overrides: recipe fields to change, data.split for instance.
        labelled: of a model with classes: measure given the data's labels; False: given none.
        variance, clip, num_timesteps, num_draws: of the bound; see `acdit.evaluation.likelihood`.
        num_points: timesteps of the curve, the middles of as many even parts of the schedule.
        num_samples: how many of the split; None: all.
        batch_size: samples at once.
        seed: of timesteps and noise.
        device: where the model runs.

    Raises:
        ConfigError: no data named, a model of text, data of another shape than the model's, a stream.
        DataError: what the data set refuses; labels beyond the model's classes.
        StorageError: the model's folder is damaged.
    """
    require_whole(model)
    recipe = recipe_to_measure(model, data, overrides)
    if recipe.corruption.kind != "gaussian":
        raise ConfigError("model", found="a model of text", expected="one of continuous data: text has a perplexity",
                          fix="acdit evaluate")  # fmt: skip
    corruption = build_corruption(recipe)
    assert isinstance(corruption, GaussianCorruption)
    chosen = as_measured(recipe.data)
    dataset = build_dataset(chosen, recipe.codec.posterior)
    if isinstance(dataset, StreamDataset):
        raise ConfigError("data.streaming", found="true", expected="false: a split is measured whole")
    codec, _ = build_codec(dataclasses.replace(recipe, data=chosen), dataset)
    pipeline: Any = load_pipeline(recipe, Path(model))
    transformer = pipeline.transformer.to(device).eval()
    layout, config = transformer.layout, transformer.config
    expected = (config.in_channels, *layout.grid)
    if data_shape(dataset, codec) != expected:
        raise ConfigError("data", found=f"samples of {data_shape(dataset, codec)}", expected=f"{expected}, the model's")
    count = min(len(dataset), num_samples or len(dataset))
    with_labels = labelled and config.num_classes is not None
    dtype = transformer.x_embedder.weight.dtype

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            samples = [dataset[index] for index in rows]
            shape = codec.noise_shape(dataset.shape)
            noise = None if shape is None else draws.normal(shape, seed=seed, stream="posterior", step=0, samples=rows)
            pixels = torch.stack([sample for sample, _ in samples])
            clean = layout.to_blocks(codec.encode(pixels, noise)).to(device, dtype)
            if not with_labels:
                yield clean, None
                continue
            labels = torch.tensor([label for _, label in samples])
            if bool(((labels < 0) | (labels >= config.num_classes)).any()):
                raise DataError("label", found=str(int(labels.max())), expected=f"0 … {config.num_classes - 1}")
            yield clean, labels.to(device)

    points = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    timesteps = corruption.uniform_timesteps(points).unique()
    loss, error = loss_over_timesteps(transformer, corruption, batches(), timesteps, seed=seed)
    pixels = EightBit(codec.mean, codec.std) if isinstance(codec, PixelCodec) else None
    bound, reason = None, None
    if corruption.is_flow:
        reason = "flow samples by an ODE, the bound is one of ancestral sampling"
    else:
        terms = BoundTerms(corruption, variance, pixels, clip)
        bound = gaussian_bound(
            transformer, terms, batches(), num_timesteps=num_timesteps, num_draws=num_draws, seed=seed
        )
    if config.num_classes is None:
        labels_told = "the model has none"
    else:
        labels_told = (
            "the data's: a bound given the label" if with_labels else "none: the null label that dropout trains"
        )
    settings = {
        "samples": count,
        "samples_of_the_split": len(dataset),
        "split": recipe.data.split,
        "data": dataclasses.asdict(chosen),
        "labels": labels_told,
        "prediction_type": corruption.prediction_type,
        "block": list(layout.block),
        "num_blocks": layout.num_blocks,
    }
    return Found(bound, reason, timesteps, loss, error, settings)
