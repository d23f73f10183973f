"""Recipe → the objects of a run, checked against each other before the first step."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acdit.corruption import GaussianCorruption, MaskingCorruption
from acdit.costs import Architecture
from acdit.data.build import TEXT_KINDS, Dataset, build_dataset, length
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError, DataError
from acdit.model import PRESETS, ACDiTTransformer
from acdit.pipelines import ACDiTPipeline
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.recipe import CorruptionRecipe, ModelRecipe, Recipe
from acdit.training.codecs import Codec, build_codec, data_shape

Corruption = GaussianCorruption | MaskingCorruption
Pipeline = ACDiTPipeline | ACDiTTextPipeline

_MASKING_ONLY = ("mask_draw", "mask_range", "first_token_given", "low_discrepancy", "range_search_every")


@dataclass
class Built:
    """The objects that a recipe names."""

    recipe: Recipe
    model: ACDiTTransformer
    corruption: Corruption
    codec: Codec
    dataset: Dataset | StreamDataset
    total_steps: int
    vae: Any = None
    """The autoencoder that the pipeline decodes with, if the recipe names one."""
    tokenizer: Any = None
    """The tokenizer of text, where the data set has one: what the pipeline reads and writes text with."""

    def pipeline(self) -> Pipeline:
        """The pipeline around the model as it is now: what gets published."""
        return assemble(self.recipe, self.model, self.dataset.class_names, self.vae, self.tokenizer)


def assemble(
    recipe: Recipe, model: ACDiTTransformer, class_names: Sequence[str], vae: Any = None, tokenizer: Any = None
) -> Pipeline:
    """The pipeline around a model that was trained by a recipe, and its autoencoder or tokenizer if it has one; needs
    no data."""
    corruption = build_corruption(recipe)
    if isinstance(corruption, MaskingCorruption):
        return ACDiTTextPipeline(model, tokenizer, begins_with_bos=recipe.data.wrap != "joined")
    names = {str(index): name for index, name in enumerate(class_names)}
    return ACDiTPipeline(
        model,
        corruption.sampling_scheduler(),
        vae=vae,
        latents=recipe.codec.kind == "vae",
        pixel_mean=recipe.codec.mean,
        pixel_std=recipe.codec.std,
        id2label=names if recipe.model.num_classes is not None else None,
    )


def load_pipeline(recipe: Recipe, folder: Path) -> Pipeline:
    """The published pipeline of a run of this recipe."""
    kind = ACDiTPipeline if recipe.model.vocab_size is None else ACDiTTextPipeline
    pipeline: Pipeline = kind.from_pretrained(folder)
    return pipeline


def build(recipe: Recipe) -> Built:
    """Make model, corruption, codec and data set. The weights depend on the recipe's seed only.

    The recipe of what is made has a `model.vocab_size` wherever the data are text: theirs, where none was given.

    Raises:
        ConfigError: parts that do not fit each other.
        DataError: the data are not what the recipe says.
    """
    _check_corruption(recipe)
    dataset = build_dataset(recipe.data, recipe.codec.posterior)
    if length(dataset) == 0:
        raise DataError("data", found="no samples", expected="at least one", fix="check data.root and data.split")
    if recipe.corruption.kind == "masking" and recipe.model.vocab_size is None:
        filled = dataclasses.replace(recipe.model, vocab_size=getattr(dataset, "vocab_size", None))
        recipe = dataclasses.replace(recipe, model=filled)
    corruption = build_corruption(recipe)
    model = build_model(recipe.model, recipe.seed)
    if recipe.train.precision == "fp64":
        model.double()
    codec, vae = build_codec(recipe, dataset)
    if recipe.model.vocab_size is None:
        _check_data(recipe, dataset, data_shape(dataset, codec), model)
    else:
        _check_text(recipe, dataset, model)
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
        corruption=corruption,
        codec=codec,
        vae=vae,
        tokenizer=getattr(dataset, "tokenizer", None),
        dataset=dataset,
        total_steps=steps,
    )


def _check_corruption(recipe: Recipe) -> None:
    """The recipe's corruption must be one for its data, and its settings of use to it; reads no data."""
    settings, kind = recipe.corruption, recipe.corruption.kind
    if (kind == "masking") != (recipe.data.kind in TEXT_KINDS):
        raise ConfigError(
            "corruption.kind", found=f"{kind!r} with data.kind={recipe.data.kind}",
            expected=f"'masking' for {', '.join(TEXT_KINDS)}, 'gaussian' for the rest",
        )  # fmt: skip
    if kind == "gaussian" and recipe.model.vocab_size is not None:
        raise ConfigError("model.vocab_size", found=str(recipe.model.vocab_size), expected="null: the data are no text")
    gaussian = [name for name in vars(settings) if name not in ("kind", "copies", *_MASKING_ONLY)]
    for name in gaussian if kind == "masking" else _MASKING_ONLY:
        usual = getattr(CorruptionRecipe(), name)
        if getattr(settings, name) != usual:
            raise ConfigError(
                f"corruption.{name}", found=repr(getattr(settings, name)),
                expected=f"{usual!r}: corruption.kind={kind} has no use for it",
            )  # fmt: skip
    if kind == "masking":
        _masking(recipe, recipe.model.vocab_size or 1)


def build_corruption(recipe: Recipe) -> Corruption:
    """The corruption of a recipe; of text it must have its vocabulary's size."""
    settings, vocab_size = recipe.corruption, recipe.model.vocab_size
    if vocab_size is None:
        known = inspect.signature(GaussianCorruption).parameters  # the rest is the batches' business
        return GaussianCorruption(**{name: value for name, value in vars(settings).items() if name in known})
    return _masking(recipe, vocab_size)


def _masking(recipe: Recipe, vocab_size: int) -> MaskingCorruption:
    settings = recipe.corruption
    low, high = settings.mask_range
    length = math.prod(recipe.model.block)
    if settings.range_search_every is not None and length == 1:
        raise ConfigError(
            "corruption.range_search_every", found=str(settings.range_search_every),
            expected="null: with one token a block there is nothing to choose",
        )  # fmt: skip
    return MaskingCorruption(length, vocab_size, settings.mask_draw, (low, high), settings.first_token_given)


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
    if given["time_conditioning"] is None:
        given["time_conditioning"] = given["vocab_size"] is None
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
    classes = recipe.model.num_classes if recipe.classification is None else dataset.num_classes
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


def _check_text(recipe: Recipe, dataset: Any, model: ACDiTTransformer) -> None:
    if dataset.vocab_size != model.config.vocab_size:
        raise ConfigError(
            "model.vocab_size", found=str(model.config.vocab_size), expected=f"{dataset.vocab_size}, as the data's "
            "tokenizer has", fix=f"set model.vocab_size={dataset.vocab_size}, or leave it out",
        )  # fmt: skip
    if tuple(dataset.shape) != model.layout.grid:
        raise ConfigError(
            "model.grid", found=str(list(model.layout.grid)), expected=f"{list(dataset.shape)}, data.sequence_length",
            fix=f"set data.sequence_length={model.layout.num_tokens}, or change model.grid",
        )  # fmt: skip
    if recipe.model.num_classes is not None:
        raise ConfigError("model.num_classes", found=str(recipe.model.num_classes), expected="null: text has no labels")
    if recipe.corruption.first_token_given and recipe.data.wrap == "joined":
        raise ConfigError(
            "corruption.first_token_given", found="true with data.wrap=joined", expected="false, or a wrap with BOS",
            fix="set data.wrap=bos: else the first token of a sequence is one of the text",
        )  # fmt: skip


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
