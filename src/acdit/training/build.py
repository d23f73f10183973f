"""Recipe → the objects of a run, checked against each other before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from acdit.codecs import PixelCodec
from acdit.corruption import GaussianCorruption
from acdit.data.build import Dataset, build_dataset
from acdit.errors import ConfigError, DataError
from acdit.model import PRESETS, ACDiTTransformer
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import ModelRecipe, Recipe


@dataclass
class Built:
    """The objects that a recipe names."""

    recipe: Recipe
    model: ACDiTTransformer
    corruption: GaussianCorruption
    codec: PixelCodec
    dataset: Dataset
    total_steps: int

    def pipeline(self) -> ACDiTPipeline:
        """The pipeline around the model as it is now: what gets published."""
        return assemble(self.recipe, self.model, self.dataset.class_names)


def assemble(recipe: Recipe, model: ACDiTTransformer, class_names: Sequence[str]) -> ACDiTPipeline:
    """The pipeline around a model that was trained by a recipe; needs no data."""
    names = {str(index): name for index, name in enumerate(class_names)}
    return ACDiTPipeline(
        model,
        _corruption(recipe).sampling_scheduler(),
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
    dataset = build_dataset(recipe.data)
    if len(dataset) == 0:
        raise DataError("data", found="no samples", expected="at least one", fix="check data.root and data.split")
    model = build_model(recipe.model, recipe.seed)
    if recipe.train.precision == "fp64":
        model.double()
    _check_data(recipe, dataset, model)
    steps = recipe.train.steps
    if steps is None:
        assert recipe.train.epochs is not None  # the recipe has exactly one of the two
        steps = max(1, recipe.train.epochs * len(dataset) // recipe.optim.batch_size)
    return Built(
        recipe=recipe,
        model=model,
        corruption=_corruption(recipe),
        codec=PixelCodec(recipe.codec.mean, recipe.codec.std),
        dataset=dataset,
        total_steps=steps,
    )


def _corruption(recipe: Recipe) -> GaussianCorruption:
    settings = dataclasses.asdict(recipe.corruption)
    settings.pop("copies")
    return GaussianCorruption(**settings)


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's groups: weight decay on the matrices of linears only."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _check_data(recipe: Recipe, dataset: Dataset, model: ACDiTTransformer) -> None:
    channels, *cells = dataset.shape
    if tuple(cells) != model.layout.grid:
        raise ConfigError(
            "model.grid", found=str(list(model.layout.grid)), expected=f"{cells}, the size of the pictures",
            fix="change model.grid, or data.size",
        )  # fmt: skip
    if channels != recipe.model.in_channels:
        raise ConfigError(
            "model.in_channels",
            found=str(recipe.model.in_channels),
            expected=f"{channels}, as the pictures have",
        )
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
    for label in recipe.sampling.labels or []:
        if label >= classes:
            raise ConfigError("sampling.labels", found=str(label), expected=f"0 … {classes - 1}")
