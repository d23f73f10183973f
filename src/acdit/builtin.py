"""Tiny trained models that come with the package, by name: what there is before any training.

Each lies in models/NAME as a run leaves it: recipe.yaml, metrics.json and model/, the pipeline's folder. They are made
by `benchmarks/builtin_models.py` from shipped recipes.
"""

from __future__ import annotations

from importlib import resources
from os import PathLike
from pathlib import Path

NAMES = ("digits", "moving-digits", "text")
"""Pictures, clips, text."""
_INDEX = "model_index.json"


def folder(name: str) -> Path:
    """The pipeline's folder of a built-in model; beside it lie the recipe and the metrics."""
    return Path(str(resources.files("acdit"))) / "models" / name / "model"


def located(model: str | PathLike[str]) -> str:
    """What is to be loaded for a model's name: a pipeline's folder that is there, else a built-in model's folder, else
    the name itself, for the hub.

    A folder of the same name that holds no pipeline does not hide a built-in model.
    """
    named = str(model)
    if named in NAMES and not (Path(named) / _INDEX).is_file():
        return str(folder(named))
    return named
