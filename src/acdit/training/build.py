"""Recipe → the objects of a run, checked against each other before the first step."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acdit.corruption import GaussianCorruption
from acdit.costs import Architecture
from acdit.data.build import Dataset, build_dataset, length
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError, DataError
from acdit.model import PRESETS, ACDiTTransformer
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import ModelRecipe, Recipe
from acdit.training.codecs import Codec, build_codec, data_shape


@dataclass
class Built:
    """The objects that a recipe names."""

    recipe: Recipe
    model: ACDiTTransformer
    corruption: GaussianCorruption
    codec: Codec
    dataset: Dataset | StreamDataset
    total_steps: int
    vae: Any = None
    """The autoencoder that the pipeline decodes with, if the recipe names one."""

    def pipeline(self) -> ACDiTPipeline:
        """The pipeline around the model as it is now: what gets published."""
        return assemble(self.recipe, self.model, self.dataset.class_names, self.vae)


def assemble(recipe: Recipe, model: ACDiTTransformer, class_names: Sequence[str], vae: Any = None) -> ACDiTPipeline:
    """The pipeline around a model that was trained by a recipe, and its autoencoder if it has one; needs no data."""
    names = {str(index): name for index, name in enumerate(class_names)}
    return ACDiTPipeline(
        model,
        _corruption(recipe).sampling_scheduler(),
        vae=vae,
        latents=recipe.codec.kind == "vae",
        pixel_mean=recipe.codec.mean,
        pixel_std=recipe.codec.std,
        id2label=names if recipe.model.num_classes is not None else None,
    )


def build(recipe: Recipe) -> Built:
    """Make model, corruption, codec and data set. The weights depend on the recipe's seed only.

    Raises:
        ConfigError: parts that do not fit each other.
        DataError: the data are not what the recipe says.
    """
    dataset = build_dataset(recipe.data, recipe.codec.posterior)
    if length(dataset) == 0:
        raise DataError("data", found="no samples", expected="at least one", fix="check data.root and data.split")
    model = build_model(recipe.model, recipe.seed)
    if recipe.train.precision == "fp64":
        model.double()
    codec, vae = build_codec(recipe, dataset)
    _check_data(recipe, dataset, data_shape(dataset, codec), model)
    steps = recipe.train.steps
    if steps is None:
        assert recipe.train.epochs is not None  # the recipe has exactly one of the two
        samples = length(dataset)
        if samples is None:
            raise ConfigError(
                "train.epochs", found=str(recipe.train.epochs), expected="train.steps: nobody knows a stream's length",
                fix="set train.steps and leave train.epochs out",
            )  # fmt: skip
        steps = max(1, recipe.train.epochs * samples // recipe.optim.batch_size)
    return Built(
        recipe=recipe,
        model=model,
        corruption=_corruption(recipe),
        codec=codec,
        vae=vae,
        dataset=dataset,
        total_steps=steps,
    )


def _corruption(recipe: Recipe) -> GaussianCorruption:
    settings = dataclasses.asdict(recipe.corruption)
    known = inspect.signature(GaussianCorruption).parameters  # the rest is the batches' business
    return GaussianCorruption(**{name: value for name, value in settings.items() if name in known})


def build_model(recipe: ModelRecipe, seed: int = 0) -> ACDiTTransformer:
    """The transformer of a recipe; `preset` fills the sizes that are not given."""
    sizes = dict(PRESETS[recipe.preset]) if recipe.preset else {}
    given = dataclasses.asdict(recipe)
    given.pop("preset")
    for name in ("num_layers", "num_attention_heads", "attention_head_dim"):
        value = given.pop(name)
        if value is not None:
            sizes[name] = value
    given["patch"] = given["patch"] or 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ACDiTTransformer(**given, **sizes)


def architecture(recipe: ModelRecipe) -> Architecture:
    """What the recipe's model costs depends on; no memory is taken for it."""
    with torch.device("meta"):
        return Architecture.of(build_model(recipe).config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's groups: weight decay on the matrices of linears only."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _check_data(
    recipe: Recipe, dataset: Dataset | StreamDataset, shape: tuple[int, ...], model: ACDiTTransformer
) -> None:
    channels, *cells = shape
    clips = len(cells) == 3
    what = "latents" if recipe.codec.kind == "vae" else "clips" if clips else "pictures"
    if tuple(cells) != model.layout.grid:
        raise ConfigError(
            "model.grid", found=str(list(model.layout.grid)), expected=f"{cells}, the size of the {what}",
            fix="change model.grid, or data.frames and data.size" if clips else "change model.grid, or data.size",
        )  # fmt: skip
    if channels != recipe.model.in_channels:
        raise ConfigError(
            "model.in_channels",
            found=str(recipe.model.in_channels),
            expected=f"{channels}, as the {what} have",
        )
    _check_sampling(recipe)
    classes = recipe.model.num_classes
    if classes is None:
        return
    if dataset.num_classes != classes:
        raise DataError(
            "model.num_classes", found=f"{classes}, and {dataset.num_classes} classes in the data",
            expected="the same number", fix=f"set model.num_classes={dataset.num_classes}, or check data.root",
        )  # fmt: skip
    labels = getattr(dataset, "labels", None)
    if labels is not None:
        labels = torch.as_tensor(labels)
        wrong = ((labels < 0) | (labels >= classes)).nonzero()
        if len(wrong):
            raise DataError(
                f"label of sample {int(wrong[0])}", found=str(int(labels[wrong[0, 0]])), expected=f"0 … {classes - 1}"
            )


def _check_sampling(recipe: Recipe) -> None:
    """What would otherwise stop a run at its first sample grid."""
    sampling, classes = recipe.sampling, recipe.model.num_classes
    wrong = [label for label in sampling.labels or [] if classes is None or label >= classes]
    if wrong:
        expected = "null: the model is unconditional" if classes is None else f"0 … {classes - 1}"
        raise ConfigError("sampling.labels", found=str(wrong[0]), expected=expected)
    train_steps = recipe.corruption.num_train_timesteps
    if sampling.num_inference_steps > train_steps:
        raise ConfigError(
            "sampling.num_inference_steps", found=str(sampling.num_inference_steps),
            expected=f"at most corruption.num_train_timesteps {train_steps}",
        )  # fmt: skip
