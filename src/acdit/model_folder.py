"""What the folder of a saved pipeline tells: whether it is whole, what a recipe takes over that starts from it, which
data its model is measured on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acdit import builtin, shims, storage
from acdit.errors import ConfigError
from acdit.recipe import CorruptionRecipe, ModelRecipe, Recipe, flatten, load_recipe

_SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def overrides_from(folder: str | Path) -> list[str]:
    """Overrides of a recipe that make its model, schedule and pixel scale those of a saved pipeline, and start from it.

    Args:
        folder: a run's model/, as `ACDiTPipeline.save_pretrained` leaves it, or a built-in model's name.

    Raises:
        ConfigError: no such folder, or a model of text.
    """
    named, folder = str(folder), Path(builtin.located(folder))
    index, config = _read(folder, "model_index.json"), _read(folder, "transformer/config.json")
    if config.get("vocab_size") is not None or shims.class_name(index) != "ACDiTPipeline":
        raise ConfigError(
            f"model {folder}", found=str(shims.class_name(index)), expected="an ACDiTPipeline: pictures or clips"
        )
    fields = ModelRecipe.__dataclass_fields__
    model = {name: value for name, value in config.items() if name in fields}
    ndim = len(model["grid"])
    model["patch"] = [model["patch"]] * ndim if isinstance(model.get("patch"), int) else model.get("patch")
    wanted: dict[str, Any] = {"train.init_from": named}
    if index.get("latents"):
        wanted["codec.kind"] = "vae"
    else:
        wanted |= {"codec.kind": "pixels", "codec.mean": index["pixel_mean"], "codec.std": index["pixel_std"]}
    scheduler = _read(folder, "scheduler/scheduler_config.json")
    flow = str(scheduler.get("_class_name", "")).startswith("FlowMatch")
    kind = "flow_prediction" if flow else scheduler.get("prediction_type", CorruptionRecipe.prediction_type)
    wanted["corruption.prediction_type"] = kind
    wanted |= {f"corruption.{name}": scheduler[name] for name in _SCHEDULE if name in scheduler}
    return [f"model={json.dumps(model)}", *(f"{path}={json.dumps(value)}" for path, value in flatten(wanted).items())]


def require_whole(folder: str | Path) -> None:
    """A pipeline's folder, undamaged where its manifest can tell.

    Raises:
        ConfigError: no pipeline's folder.
        StorageError: a damaged one.
    """
    named, folder = folder, Path(builtin.located(folder))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"model {named}", found="no model_index.json there", expected="the folder of a saved pipeline",
            fix="train one (make demo leaves runs/demo/model), or check the path",
        )  # fmt: skip
    if storage.is_committed(folder):
        storage.verify(folder)


def beside_model(model: str | Path, name: str) -> Path | None:
    """A file of the run that a model comes from: inside a folder that travels, else beside the run's model/."""
    folder = Path(builtin.located(model))
    places = (folder / name, folder.parent / name)
    return next((place for place in places if folder.is_dir() and place.is_file()), None)


def recipe_to_measure(model: str | Path, data: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe whose data a model is measured on: another split of what its run has learned from, or `data`.

    Args:
        model: the model's folder, recipe.yaml of its run beside it, or in it; or a built-in model's name.
        data: a recipe (a shipped one's name or a YAML path) instead.
        overrides: of the recipe. Without `data` they name the split, but for runs that have a validation split.

    Raises:
        ConfigError: no recipe, or no split named.
    """
    if data is not None:
        return load_recipe(data, overrides)
    beside = beside_model(model, "recipe.yaml")
    if beside is None:
        raise ConfigError(
            "--data", found="nothing, and no recipe.yaml beside the model", expected="a recipe with the data",
            fix="--data my.yaml data.split=held_out",
        )  # fmt: skip
    recipe = load_recipe(beside, overrides)
    if any(text.partition("=")[0].strip() == "data.split" for text in overrides):
        return recipe
    split = None if recipe.classification is None else recipe.classification.validation_split
    if split is None:
        raise ConfigError(
            "data.split", found=f"nothing; {recipe.data.split!r} was trained on", expected="the split to measure on",
            fix="add data.split=held_out (or validation, test, …) behind the model",
        )  # fmt: skip
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, split=split))


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {folder}", found=f"{name}: {type(error).__name__}", expected="the folder of a saved ACDiTPipeline",
            fix="a run's model/ (make demo leaves runs/demo/model)",
        ) from None  # fmt: skip
    return dict(found)
