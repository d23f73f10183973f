"""Loss over model size: several finished runs of the same data and corruption, read from their folders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acdit.errors import ConfigError, DataError
from acdit.flops import training_flops
from acdit.pictures import log_records
from acdit.recipe import Recipe, difference, load_recipe
from acdit.training.build import architecture

_MAY_DIFFER = (
    "name", "seed", "model.preset", "model.num_layers", "model.num_attention_heads", "model.attention_head_dim",
    "model.mlp_ratio", "optim.", "ema.", "train.", "sampling.", "data.num_workers", "data.shuffle_buffer",
)  # fmt: skip
"""Sizes, and how a run was done; the rest decides what a loss means."""


def read_runs(folders: Sequence[str], metrics: str | None, key: str, tail: float) -> list[dict[str, Any]]:
    """A row a run, smallest model first.

    Args:
        folders: of finished runs.
        metrics: name of a JSON in each folder, loss.json for instance; None: the training loss of log.jsonl.
        key: of the figure in it, dotted: bound.bits_per_dim.
        tail: share of the steps at the end over which the training loss is averaged.

    Raises:
        ConfigError: fewer than two runs, no run, one that has not finished, runs that are not comparable.
        DataError: no such figure.
    """
    if len(folders) < 2:
        raise ConfigError("RUNS", found=f"{len(folders)} of them", expected="at least two")
    recipes = [_recipe(Path(folder)) for folder in folders]
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        apart = [path for path in difference(recipes[0], recipe) if not path.startswith(_MAY_DIFFER)]
        if apart:
            one, other = difference(recipes[0], recipe)[apart[0]]
            raise ConfigError(
                f"{folder}: {apart[0]}", found=repr(other), expected=f"{one!r}, as in {folders[0]}: else losses do not "
                "compare",
            )  # fmt: skip
    rows = [_row(Path(folder), recipe, metrics, key, tail) for folder, recipe in zip(folders, recipes, strict=True)]
    return sorted(rows, key=lambda row: (row["parameters"], row["name"]))


def fit_power(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """factor · parameters^exponent, by least squares of logarithms; None of fewer than three sizes, or of losses that
    are not positive (bits of a density can be negative)."""
    sizes, values = ([float(row[name]) for row in rows] for name in ("parameters", "value"))
    if len(set(sizes)) < 3 or min(values) <= 0:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    factor = math.exp(mean_y - exponent * mean_x)
    worst = max(abs(value / (factor * size**exponent) - 1) for size, value in zip(sizes, values, strict=True))
    return {"factor": factor, "exponent": exponent, "largest_deviation": worst}


def _recipe(folder: Path) -> Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"run {folder}", found="no recipe.yaml there", expected="the folder of a run")
    return load_recipe(folder / "recipe.yaml")


def _row(folder: Path, recipe: Recipe, metrics: str | None, key: str, tail: float) -> dict[str, Any]:
    if not (folder / "log.jsonl").is_file():
        raise DataError(f"{folder / 'log.jsonl'}", found="no such file", expected="the log of a run")
    records = log_records(folder / "log.jsonl")
    last = int(records[-1]["step"])
    if not (folder / "model" / "model_index.json").is_file():
        raise ConfigError(f"run {folder}", found=f"step {last} and no model", expected="a finished run",
                          fix="acdit train --resume")  # fmt: skip
    arch = architecture(recipe.model)
    a_step = training_flops(
        arch, recipe.optim.batch_size, recipe.corruption.copies, recipe.train.gradient_checkpointing
    )
    row: dict[str, Any] = {
        "name": folder.name,
        "run": str(folder),
        "parameters": arch.parameters,
        "steps": last,
        "training_flops": last * a_step,
        "curve": {
            "flops": [record["step"] * a_step for record in records],
            "loss": [float(record["loss"]) for record in records],
        },
    }
    if metrics is None:
        losses = [float(record["loss"]) for record in records if record["step"] > last * (1 - tail)]
        mean = sum(losses) / len(losses)
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1))
        return row | {"value": mean, "standard_error": spread / math.sqrt(len(losses)), "records": len(losses)}
    return row | {"value": _figure(folder / metrics, key)}


def _figure(path: Path, key: str) -> float:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}", found=type(error).__name__, expected="a JSON of figures, as acdit analyze loss "
                        "writes") from None  # fmt: skip
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{path}: {key}", found=repr(value)[:60], expected="a number")
    return float(value)
