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
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Union

import yaml

from acdit.errors import ConfigError
from acdit.strict_yaml import read_yaml

# --- the tree ----------------------------------------------------------------------------------------------------


@dataclass
class ModelRecipe:
    """Arguments of `ACDiTTransformer`. `preset` (B, L, XL, H) fills the sizes that are not given."""

    grid: list[int]
    block: list[int]
    patch: list[int] | None = None
    in_channels: int = 4
    preset: str | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    rope: str = "axial"
    rope_split: list[int] | None = None
    window: int | None = None
    sink_blocks: int = 0
    sink_positions: str = "true"


@dataclass
class DataRecipe:
    """What to train on.

    `size` is what pictures are resized and cropped to: a square's side, or [height, width]. `classes` is a file that
    gives classes their order and names. `shuffle_buffer` counts the rows of a stream that are shuffled together;
    up to twice as many lie in the memory of each process, undecoded.

    A clip has `frames` frames: of those its file shows (with `fps`, of so many a second) every `frame_stride`-th, from
    `start` on: random, center or first. `short_clips` says what becomes of shorter files: error or loop. `split_file`
    is one of UCF-101's lists. Of moving digits there are `digits_per_clip`.
    """

    kind: str
    root: str | None = None
    split: str = "train"
    size: int | list[int] | None = None
    crop: str = "center"
    channels: int = 3
    flip: bool = False
    classes: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    shuffle_buffer: int = 2048
    frames: int = 16
    frame_stride: int = 1
    fps: float | None = None
    start: str = "random"
    short_clips: str = "error"
    split_file: str | None = None
    digits_per_clip: int = 1
    max_bad_files: int = 0
    num_workers: int = 0


@dataclass
class CodecRecipe:
    """`pixels`: model space is (value in [0, 1] − mean) / std.

    `vae`: latents of the diffusers autoencoder `vae` (a folder or a hub id, in its `subfolder`), from pictures at every
    step or cached (data.kind=latents; then `vae` may be left out, and the model is published without it). The
    autoencoder's own scale is used; `scaling_factor`, `shift_factor` and `vae_sha256` only say what it must be.
    `posterior` is mode or sample. `tiling` and `slicing` save memory on large pictures.
    """

    kind: str = "pixels"
    mean: float = 0.5
    std: float = 0.5
    vae: str | None = None
    subfolder: str | None = None
    posterior: str = "mode"
    scaling_factor: float | None = None
    shift_factor: float | None = None
    vae_sha256: str | None = None
    tiling: bool = False
    slicing: bool = False


@dataclass
class CorruptionRecipe:
    """Arguments of `GaussianCorruption`; how many noisy copies share one clean pass; how noisy the context may be.

    `context_noise`: 0, clean context (the paper's). Above 0 each clean block is replaced, for the context only, by its
    corruption at a timestep of its own, uniform below this share of the schedule: 1 is the paper's ablation "noisy
    context". The model is not told. Sampling context is clean.

    `self_context`: the share of samples whose context is of the model's own making (see
    `acdit.training.self_context`), in `self_context_steps` model calls a block from at most `self_context_strength` of
    the schedule: fine-tuning against drift over long streams.
    """

    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep_draw: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    copies: int = 1
    context_noise: float = 0.0
    self_context: float = 0.0
    self_context_steps: int = 2
    self_context_strength: float = 0.5


@dataclass
class OptimRecipe:
    """AdamW. `batch_size` is global; `accumulation` cuts it into micro-batches."""

    batch_size: int
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.15
    label_dropout: float = 0.1


@dataclass
class EMARecipe:
    """Exponential moving averages of the weights; the first decay is the model that is published."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    warmup: bool = True
    inv_gamma: float = 1.0
    power: float = 2 / 3


@dataclass
class TrainRecipe:
    """How long and how. Exactly one of `steps` and `epochs`.

    `parallel` is how several processes share the work: "ddp" (whole weights in each) or "fsdp2" (rows of the weights,
    averages and moments in each). After `timeout_seconds` without an answer, the other processes count as lost.
    `init_from` is a saved model to start from: its folder or hub id.
    """

    steps: int | None = None
    epochs: int | None = None
    precision: str = "fp32"
    compile: bool = False
    gradient_checkpointing: str = "none"
    parallel: str = "ddp"
    init_from: str | None = None
    timeout_seconds: int = 1800
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    sample_every: int | None = None
    tensorboard: bool = True
    threads: int | None = None


@dataclass
class SamplingRecipe:
    """How sample grids are drawn while training."""

    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    labels: list[int] | None = None


@dataclass
class Recipe:
    """Everything that defines a run."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    optim: OptimRecipe
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    corruption: CorruptionRecipe = field(default_factory=CorruptionRecipe)
    ema: EMARecipe = field(default_factory=EMARecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    seed: int = 0


CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": ("B", "L", "XL", "H"),
    "model.rope": ("axial", "reference", "1d", "none"),
    "model.sink_positions": ("true", "sliding"),
    "data.kind": (
        "digits", "images", "idx", "webdataset", "hf", "latents", "clips", "moving_digits", "moving_idx",
    ),
    "data.crop": ("center", "random"),
    "data.start": ("random", "center", "first"),
    "data.short_clips": ("error", "loop"),
    "codec.kind": ("pixels", "vae"),
    "codec.posterior": ("mode", "sample"),
    "corruption.prediction_type": ("epsilon", "v_prediction", "flow_prediction"),
    "corruption.timestep_draw": ("uniform", "logit_normal"),
    "corruption.beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "optim.schedule": ("wsd", "cosine", "constant"),
    "train.precision": ("fp32", "bf16", "fp64"),
    "train.gradient_checkpointing": ("none", "elementwise", "layers"),
    "train.parallel": ("ddp", "fsdp2"),
}  # fmt: skip
# Inclusive lower bound and exclusive upper bound of numbers; lists are checked value by value.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63),
    "model.grid": (1, 2**31), "model.block": (1, 2**31), "model.patch": (1, 2**31),
    "model.in_channels": (1, 2**31), "model.num_layers": (1, 2**31), "model.num_attention_heads": (1, 2**31),
    "model.attention_head_dim": (2, 2**31), "model.num_classes": (1, 2**31), "model.rope_split": (1, 2**31),
    "model.window": (1, 2**31), "model.sink_blocks": (0, 2**31),
    "data.size": (1, 2**31), "data.channels": (1, 5), "data.max_bad_files": (0, 2**31), "data.num_workers": (0, 4096),
    "data.shuffle_buffer": (1, 2**31), "data.frames": (1, 2**16), "data.frame_stride": (1, 2**16),
    "data.fps": (1e-3, 1001), "data.digits_per_clip": (1, 3),
    "codec.std": (1e-12, math.inf), "codec.scaling_factor": (1e-12, math.inf), "codec.shift_factor": (-1e12, 1e12),
    "corruption.num_train_timesteps": (1, 2**31), "corruption.copies": (1, 2**31),
    "corruption.context_noise": (0, 1 + 1e-12), "corruption.self_context": (0, 1 + 1e-12),
    "corruption.self_context_steps": (1, 10_000), "corruption.self_context_strength": (1e-12, 1 + 1e-12),
    "corruption.beta_start": (1e-12, 1), "corruption.beta_end": (1e-12, 1), "model.mlp_ratio": (1e-12, 2**31),
    "corruption.logit_std": (1e-12, math.inf), "corruption.min_snr_gamma": (1e-12, math.inf),
    "optim.batch_size": (1, 2**31), "optim.lr": (0, math.inf), "optim.betas": (0, 1), "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf), "optim.accumulation": (1, 2**31), "optim.max_grad_norm": (1e-12, math.inf),
    "optim.warmup_steps": (0, 2**31), "optim.decay_fraction": (0, 1 + 1e-12), "optim.label_dropout": (0, 1),
    "ema.decays": (0, 1), "ema.inv_gamma": (1e-12, math.inf), "ema.power": (0, math.inf),
    "train.steps": (1, 2**31), "train.epochs": (1, 2**31), "train.checkpoint_every": (1, 2**31),
    "train.keep_checkpoints": (1, 2**31), "train.log_every": (1, 2**31), "train.sample_every": (1, 2**31),
    "train.threads": (1, 4096), "train.timeout_seconds": (1, 2**31),
    "sampling.num_inference_steps": (1, 10_000), "sampling.guidance_scale": (0, math.inf),
    "sampling.labels": (0, 2**31),
}  # fmt: skip

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
        if values[path] is not None and values[path] not in known:
            raise ConfigError(
                path, found=repr(values[path]), expected=f"one of {known}", fix=_nearest(str(values[path]), known)
            )
    for path, (low, high) in RANGES.items():
        items = values[path] if isinstance(values[path], list) else [values[path]]
        for item in items:
            if item is not None and not low <= item < high:
                raise ConfigError(
                    path, found=repr(item), expected=f"at least {low:g}" + f" and below {high:g}" * (high < 2**31)
                )
    for path, length in (("optim.betas", 2), ("data.size", 2)):
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
    return resources.files("acdit").joinpath("recipes", f"{name_or_path}.yaml").read_text(
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
