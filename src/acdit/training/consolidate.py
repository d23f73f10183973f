"""From a checkpoint, whole or in shards, to one model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from acdit import storage
from acdit.codecs import load_vae
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer
from acdit.recipe import Recipe, recipe_from_dict
from acdit.training.build import assemble, build_model
from acdit.training.checkpoints import read_description
from acdit.training.ema import ema_variant
from acdit.training.shards import Part

WEIGHTS = ("ema", "raw")


def consolidate(
    checkpoint: str | Path, output: str | Path, *, weights: str = "ema", decay: float | None = None
) -> Path:
    """Make a model folder (an `ACDiTPipeline`) out of a checkpoint of any form.

    One tensor after the other is put together: at most the model is in memory, whatever the checkpoint holds.

    Args:
        checkpoint: RUN/checkpoint-N; every file is checked first.
        output: the folder to make.
        weights: "ema" for an average, "raw" for the weights that training goes on with.
        decay: which average; None: the first, as a run publishes it.

    Returns:
        The folder.

    Raises:
        ConfigError: the checkpoint has no such weights.
        StorageError: the checkpoint is damaged or lacks something, or the folder cannot be written.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if weights not in WEIGHTS:
        raise ConfigError("weights", found=repr(weights), expected=f"one of {WEIGHTS}")
    storage.verify(checkpoint)
    description = read_description(checkpoint)
    decays = [entry["decay"] for entry in description["ema"]]
    if decay is not None and (weights == "raw" or decay not in decays):
        found = f"{decay} with raw weights" if weights == "raw" else str(decay)
        raise ConfigError("decay", found=found, expected=f"one of {decays}, of an average")
    recipe = recipe_from_dict(description["recipe"])
    part = "model" if weights == "raw" else f"ema-{0 if decay is None else decays.index(decay)}"
    model = read_model(checkpoint, part, recipe, description.get("shards", 1))
    with storage.atomic_directory(output) as directory:
        assemble(recipe, model, description.get("class_names", ()), _vae(recipe)).save_pretrained(directory)
    return output


def publish(checkpoint: Path, output: Path, vae: Any = None, tokenizer: Any = None) -> None:
    """model/ of a run from its newest checkpoint: the first average, and the others as variants (`ema_variant`)."""
    description = read_description(checkpoint)
    recipe, shards = recipe_from_dict(description["recipe"]), description.get("shards", 1)
    with storage.atomic_directory(output) as directory:
        for index, average in enumerate(description["ema"]):
            model = read_model(checkpoint, f"ema-{index}", recipe, shards)
            if index == 0:
                assemble(recipe, model, description["class_names"], vae, tokenizer).save_pretrained(directory)
            else:
                model.save_pretrained(directory / "transformer", variant=ema_variant(average["decay"]))


def _vae(recipe: Recipe) -> Any:
    """The autoencoder that the recipe names, to be published with the model."""
    return None if recipe.codec.vae is None else load_vae(recipe.codec.vae, recipe.codec.subfolder)


def read_model(checkpoint: Path, part: str, recipe: Recipe, shards: int) -> ACDiTTransformer:
    """The model with one part's weights, in the precision they were saved in.

    Raises:
        StorageError: the part is not this recipe's model.
    """
    source = Part(checkpoint, part, shards)
    model = empty_model(recipe)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source.require(shapes)
    model.load_state_dict({name: source.tensor(name) for name in shapes}, assign=True)
    return model


def empty_model(recipe: Recipe) -> ACDiTTransformer:
    """The recipe's model without memory for its weights: `load_state_dict(…, assign=True)` brings them."""
    with torch.device("meta"):
        return build_model(recipe.model, recipe.seed)
