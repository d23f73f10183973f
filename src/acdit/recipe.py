"""Recipes: everything that defines a run, one typed tree of plain dataclasses, read strictly.

A recipe is YAML plus dotted overrides (`optim.lr=2e-4`). Reading is stricter than YAML libraries are: no tags, no
duplicate keys, no NaN or overflowing numbers, no unknown keys, no values of another type, and every refusal names the
dotted path and the nearest known key. The reader is small and ours because a general one (jsonargparse) hides which
key of which mapping was wrong behind its own usage message.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Union

import yaml

from acdit.errors import ConfigError
from acdit.recipe_fields import (
    CHOICES,
    RANGES,
    ClassificationRecipe,
    CodecRecipe,
    CorruptionRecipe,
    DataRecipe,
    EMARecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    SamplingRecipe,
    TrainRecipe,
)
from acdit.strict_yaml import read_yaml

__all__ = [
    "CHOICES", "RANGES", "ClassificationRecipe", "CodecRecipe", "CorruptionRecipe", "DataRecipe", "EMARecipe",
    "ModelRecipe", "OptimRecipe", "Recipe", "SamplingRecipe", "TrainRecipe", "difference", "differing", "flatten",
    "load_recipe", "recipe_from_dict", "recipe_to_dict", "recipe_to_json", "recipe_to_yaml", "shipped_recipes",
]  # fmt: skip

# --- from data to dataclasses and back ---------------------------------------------------------------------------


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(known)}"


def _read(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`; nothing is converted but an int where a float is asked."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [argument for argument in arguments if argument is not type(None)]
        lists = [argument for argument in members if typing.get_origin(argument) is list]
        return _read(lists[0] if lists and isinstance(value, list) else members[0], value, path)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(path, found=_shown(value), expected="a list")
        return [_read(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
        choices = f"one of {', '.join(CHOICES[path])}" if path in CHOICES else names[kind]
        raise ConfigError(path, found=_shown(value), expected=choices)
    if kind is not float:
        return value
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(path, found=_shown(value), expected="a number that fits a float") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


def _read_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(path or "recipe", found=_shown(value), expected="a mapping")
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}", found="an unknown key", fix=_nearest(str(key), list(hints)))
    for item in dataclasses.fields(kind):
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if not optional and item.name not in value:
            raise ConfigError(f"{prefix}{item.name}", found="nothing", expected="a value: it has no default")
    return kind(**{key: _read(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def recipe_from_dict(data: Any) -> Recipe:
    """A checked recipe from plain data (parsed YAML or JSON).

    Raises:
        ConfigError: unknown or missing keys, wrong types, values out of range; the dotted path is named.
    """
    recipe = _read_dataclass(Recipe, data, "")
    _check(recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data, every field spelled out."""
    return dataclasses.asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, allow_unicode=True)


def recipe_to_json(recipe: Recipe) -> str:
    """JSON, as checkpoints carry it."""
    return json.dumps(recipe_to_dict(recipe), indent=2, ensure_ascii=False)


def difference(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted path."""
    return differing(recipe_to_dict(one), recipe_to_dict(other))


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two trees of settings, by dotted path; None stands for what is missing."""
    left, right = flatten(one), flatten(other)
    paths = dict.fromkeys([*left, *right])
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings → one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check(recipe: Recipe) -> None:
    values = flatten(recipe_to_dict(recipe))
    for path, known in CHOICES.items():
        if values.get(path) is not None and values[path] not in known:
            raise ConfigError(
                path, found=repr(values[path]), expected=f"one of {known}", fix=_nearest(str(values[path]), known)
            )
    for path, (low, high) in RANGES.items():
        value = values.get(path)  # of a group that is left out nothing is there
        items = value if isinstance(value, list) else [value]
        for item in items:
            if item is not None and not low <= item < high:
                raise ConfigError(
                    path, found=repr(item), expected=f"at least {low:g}" + f" and below {high:g}" * (high < 2**31)
                )
    for path, length in (("optim.betas", 2), ("data.size", 2), ("corruption.mask_range", 2)):
        if isinstance(values[path], list) and len(values[path]) != length:
            raise ConfigError(path, found=repr(values[path]), expected=f"{length} numbers")
    if recipe.model.window is None and (recipe.model.sink_blocks or recipe.model.sink_positions != "true"):
        raise ConfigError(
            "model.sink_blocks, model.sink_positions",
            found=f"{recipe.model.sink_blocks}, {recipe.model.sink_positions!r} without model.window",
            expected="0 and 'true': without a window every block stays in sight",
        )
    own = recipe.corruption.self_context
    if own and (recipe.corruption.context_noise or recipe.train.parallel == "fsdp2"):
        other = "corruption.context_noise" if recipe.corruption.context_noise else "train.parallel=fsdp2"
        raise ConfigError("corruption.self_context", found=f"{own:g} with {other}", expected="one of the two")
    if recipe.classification is not None:
        _check_classification(recipe, recipe.classification)
    if not recipe.ema.decays:
        raise ConfigError("ema.decays", found="an empty list", expected="at least one decay; the first is published")
    if (recipe.train.steps is None) == (recipe.train.epochs is None):
        found = "both" if recipe.train.steps is not None else "neither"
        raise ConfigError("train.steps, train.epochs", found=found, expected="exactly one of the two")
    if recipe.optim.batch_size % recipe.optim.accumulation:
        raise ConfigError(
            "optim.accumulation", found=str(recipe.optim.accumulation),
            expected=f"a divisor of optim.batch_size {recipe.optim.batch_size}",
        )  # fmt: skip
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim")
    missing = [f"model.{name}" for name in sizes if getattr(recipe.model, name) is None]
    if recipe.model.preset is None and missing:
        raise ConfigError(", ".join(missing), found="nothing", expected="a size", fix="give them, or model.preset")


def _check_classification(recipe: Recipe, head: ClassificationRecipe) -> None:
    if not head.layers:
        raise ConfigError("classification.layers", found="an empty list", expected="at least one layer")
    if head.tune == "head":
        for name in ("bidirectional", "layer_decay"):
            usual = getattr(ClassificationRecipe(), name)
            if getattr(head, name) != usual:
                raise ConfigError(
                    f"classification.{name}", found=f"{getattr(head, name)!r} with classification.tune=head",
                    expected=f"{usual!r}: the model does not learn", fix="set classification.tune=all",
                )  # fmt: skip
    if head.bidirectional and head.noise_timestep is not None:
        raise ConfigError(
            "classification.bidirectional", found="true with classification.noise_timestep",
            expected="one of the two: a noisy block sees the clean ones before it",
        )  # fmt: skip
    if head.noise_timestep is not None and head.noise_timestep >= recipe.corruption.num_train_timesteps:
        raise ConfigError(
            "classification.noise_timestep", found=f"{head.noise_timestep:g}",
            expected=f"below corruption.num_train_timesteps {recipe.corruption.num_train_timesteps}",
        )  # fmt: skip
    if head.mixup and recipe.optim.batch_size // recipe.optim.accumulation % 2:
        raise ConfigError(
            "classification.mixup", found=f"{head.mixup:g} with micro-batches of an odd number of samples",
            expected="an even number: neighbours are mixed", fix="change optim.batch_size or optim.accumulation",
        )  # fmt: skip
    if recipe.train.sample_every is not None and head.validation_split is None:
        raise ConfigError(
            "train.sample_every", found=f"{recipe.train.sample_every} without classification.validation_split",
            expected="a split to measure on", fix="set it, or train.sample_every=null",
        )  # fmt: skip
    if recipe.train.parallel == "fsdp2":
        raise ConfigError("train.parallel", found="'fsdp2' with classification", expected="'ddp'")


# --- loading -----------------------------------------------------------------------------------------------------


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("acdit").joinpath("recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a YAML file by path, with dotted overrides.

    Args:
        name_or_path: "digits", or a path that ends in .yaml or .yml.
        overrides: "optim.lr=2e-4" and the like; values are YAML.

    Raises:
        ConfigError: see `recipe_from_dict`; also an unknown name, a missing file, a malformed override.
    """
    text, name = _recipe_text(name_or_path)
    data = read_yaml(text, name)
    if not isinstance(data, dict):
        raise ConfigError(name, found=_shown(data), expected="a mapping of recipe keys")
    for override in overrides:
        _override(data, override)
    return recipe_from_dict(data)


def _recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except OSError as error:
            raise ConfigError(
                f"recipe {path}", found=error.strerror or str(error), expected="a readable file"
            ) from None
        except UnicodeDecodeError:
            raise ConfigError(f"recipe {path}", found="bytes that are not UTF-8", expected="a YAML file") from None
    known = shipped_recipes()
    if str(name_or_path) not in known:
        raise ConfigError(
            f"recipe {str(name_or_path)!r}", found="no such recipe",
            expected=f"one of {', '.join(known)}, or a path that ends in .yaml", fix=_nearest(str(name_or_path), known),
        )  # fmt: skip
    return resources.files("acdit").joinpath("recipes").joinpath(f"{name_or_path}.yaml").read_text(
        "utf-8"
    ), f"{name_or_path}.yaml"


def _override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().replace("-", "_").split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}", expected="key.key=value", fix="write for instance optim.lr=2e-4")
    here = data
    for depth, key in enumerate(keys[:-1]):
        inner = here.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(".".join(keys[: depth + 1]), found="a value", expected="a group of keys")
        here = inner
    here[keys[-1]] = read_yaml(text, f"override {override!r}")
