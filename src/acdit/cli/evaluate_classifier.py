"""acdit evaluate --classification: how often a classifier is right."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acdit.cli.classify import load_classifier
from acdit.cli.evaluate_text import provenance_fields

if TYPE_CHECKING:
    from acdit.recipe import DataRecipe

_OTHERS = (
    "extractor", "weights", "preprocessing", "frames", "frame_stride", "span", "work", "size", "sweep", "self_test",
    "estimator", "draws", "language_model", "labels", "solver",
)  # fmt: skip


def evaluate_classifier(options: argparse.Namespace) -> None:
    """Top-1 and top-5 with their intervals, into the result file.

    Raises:
        ConfigError: options of samples, no classifier, data it was not made for.
    """
    from acdit import storage
    from acdit.data.build import build_dataset
    from acdit.errors import ConfigError
    from acdit.evaluation.classification import measure_accuracy
    from acdit.processes import joined_processes

    for name in _OTHERS:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}", found="--classification", expected="one of the two")
    if not options.samples:
        raise ConfigError("SAMPLES", found="nothing", expected="the folder of a model with a classifier/")
    model: str = options.samples[0]
    overrides: list[str] = [*options.samples[1:], *options.overrides]
    started = time.perf_counter()
    with joined_processes() as processes:
        classifier = load_classifier(model, str(processes.device(options.device)), options.vae)
        data = _data(options, model, overrides)
        dataset: Any = build_dataset(data)
        figures = measure_accuracy(
            classifier, dataset, batch_size=options.batch_size, count=options.num_samples, processes=processes
        )
        if not processes.is_first:
            return
    head = classifier.classifier.head.config
    settings = ("pooling", "layers", "bidirectional", "noise_timestep")
    storage.write_json_atomic(options.output, {
        **figures,
        "classes": len(classifier.class_names),
        "head": {name: head[name] for name in settings},
        "data": dataclasses.asdict(data),
        "model": model,
        "processes": processes.size,
        **provenance_fields(),
        "seconds": round(time.perf_counter() - started, 1),
    })  # fmt: skip
    told = [
        f"{name} {figures[name]:.4f} (95 % {figures[f'{name}_interval'][0]:.4f} … {figures[f'{name}_interval'][1]:.4f})"
        for name in ("top1", "top5")
        if name in figures
    ]
    print(f"{', '.join(told)} on {figures['num_samples']} samples of split {data.split!r}; see {options.output}")


def _data(options: argparse.Namespace, model: str, overrides: list[str]) -> DataRecipe:
    """What to measure on: a recipe's data, by default the validation split of the run that left the model."""
    from acdit.errors import ConfigError
    from acdit.recipe import load_recipe

    beside = Path(model).parent / "recipe.yaml"
    if options.reference is None and not beside.is_file():
        raise ConfigError(
            "--data", found="nothing, and no recipe.yaml beside the model", expected="a recipe that names the data"
        )
    recipe = load_recipe(options.reference or str(beside), overrides)
    data = dataclasses.replace(recipe.data, crop="center", flip=False)
    named = any(override.partition("=")[0].strip() == "data.split" for override in overrides)
    if options.reference is None and not named:
        if recipe.classification is None or recipe.classification.validation_split is None:
            raise ConfigError(
                "data.split", found="nothing", expected="the split to measure on: the run has learned from "
                f"{data.split!r}", fix="add data.split=NAME",
            )  # fmt: skip
        data = dataclasses.replace(data, split=recipe.classification.validation_split)
    return data
