"""What the commands that draw pictures share: their options, and the model, solver and labels that these name."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from acdit import builtin
from acdit.cli.parser import finite, positive, seed
from acdit.shims import TEXT_CLASS, class_name
from acdit.solvers import SOLVERS

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
OF_PICTURES = {
    "labels": None, "guidance_scale": 1.5, "solver": None, "vae": None, "vae_tiling": False, "vae_slicing": False,
}  # fmt: skip
"""Sampling options that texts have no use for, and their defaults."""


def add_sampling_options(made: argparse.ArgumentParser) -> None:
    """Declare what a picture depends on."""
    made.add_argument("--labels", nargs="+", metavar="LABEL", help="class indices, ranges (0-9) or class names")
    made.add_argument("--steps", type=positive, default=25, help="solver steps a block (default 25)")
    made.add_argument("--guidance-scale", type=finite, default=1.5, help="1 is off (default 1.5)")
    made.add_argument("--solver", choices=sorted(SOLVERS), help="default: the one saved with the model")
    made.add_argument("--seed", type=seed, default=0, help="picture i gets seed + i (default 0)")
    made.add_argument("--batch-size", type=positive, default=64, help="pictures at once (default 64)")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default fp32)")
    made.add_argument("--device", help="default: cuda where there is one")
    made.add_argument("--vae", metavar="PATH", help="autoencoder to decode with, for a model saved without its own")
    made.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    made.add_argument("--vae-slicing", action="store_true", help="decode picture by picture: less memory")


def load_pipeline(options: argparse.Namespace, device: Any = None) -> Any:
    """The pipeline that `options.model` names, with the asked dtype and solver.

    Raises:
        ConfigError: no such model or device, or a solver of another kind than the model was trained for.
        StorageError: the folder is damaged.
    """
    import torch

    from acdit import ACDiTPipeline
    from acdit.errors import ConfigError, StorageError, first_line

    folder = Path(options.model)
    _require_whole(folder, options.model)
    dtype = getattr(torch, DTYPES[options.dtype])
    chosen = chosen_device(device or options.device)
    try:
        pipeline = ACDiTPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if folder.exists():
            raise StorageError(f"model {options.model}", found=reason, expected="a saved ACDiTPipeline") from error
        raise ConfigError(
            f"model {options.model}", found=f"no such folder, and no such model on the hub ({reason})",
            expected="a saved ACDiTPipeline",
            fix=f"name a built-in one ({', '.join(builtin.NAMES)}), or what make demo leaves: runs/demo/model",
        ) from error  # fmt: skip
    if options.vae is not None:
        from acdit.codecs import load_vae

        pipeline.register_modules(vae=load_vae(options.vae))
    if options.vae_tiling or options.vae_slicing:
        from acdit.codecs.autoencoders import set_memory_savers

        if pipeline.vae is None:
            raise ConfigError("--vae-tiling, --vae-slicing", found="a model without an autoencoder", expected="neither")
        set_memory_savers(pipeline.vae, tiling=options.vae_tiling, slicing=options.vae_slicing)
    if dtype != torch.float32:
        pipeline.transformer.to(dtype)
    if options.solver is not None:
        from acdit.solvers import make_solver

        pipeline.scheduler = make_solver(pipeline.scheduler, options.solver, "--solver")
    trained = getattr(pipeline.scheduler.config, "num_train_timesteps", None)
    if trained is not None and options.steps > trained:
        raise ConfigError("--steps", found=str(options.steps), expected=f"at most {trained}, the steps of the training")
    return pipeline.to(chosen)


def is_text_model(model: str) -> bool:
    """Whether a folder, or the built-in model of that name, is an `ACDiTTextPipeline`; others are pictures or clips."""
    index = Path(builtin.located(model)) / "model_index.json"
    try:
        return class_name(json.loads(index.read_text(encoding="utf-8"))) == TEXT_CLASS
    except (OSError, ValueError, AttributeError):
        return False


def load_text_pipeline(options: argparse.Namespace, device: Any = None) -> Any:
    """The text pipeline that `options.model` names, with the asked dtype, on the asked or given device.

    Raises:
        ConfigError: no such device, or an option of pictures.
        StorageError: the folder is damaged.
    """
    import torch

    from acdit import ACDiTTextPipeline
    from acdit.errors import ConfigError, StorageError, first_line

    for name, usual in OF_PICTURES.items():
        if getattr(options, name) != usual:
            raise ConfigError(f"--{name.replace('_', '-')}", found="a model of text", expected="a model of pictures")
    folder = Path(options.model)
    _require_whole(folder, options.model)
    chosen = chosen_device(device or options.device)
    try:
        pipeline = ACDiTTextPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"model {options.model}", found=first_line(error), expected="a saved ACDiTTextPipeline"
        ) from error
    dtype = getattr(torch, DTYPES[options.dtype])
    if dtype != torch.float32:
        pipeline.transformer.to(dtype)
    return pipeline.to(chosen)


def _require_whole(folder: Path, named: str) -> None:
    """A folder that is there must be a pipeline's, and undamaged where its manifest can tell."""
    from acdit.model_folder import require_whole

    if folder.exists() or named.startswith((".", "/", "runs/")):  # else a name on the hub
        require_whole(named)


def chosen_device(wanted: Any = None) -> Any:
    """A torch device that is there; None: cuda where there is one.

    Raises:
        ConfigError: it is not.
    """
    import torch

    from acdit.errors import ConfigError, first_line

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "--device", found=str(wanted), expected="cpu, cuda or another that torch has here",
            fix=first_line(error),
        ) from None  # fmt: skip
    return device


def asked_labels(options: argparse.Namespace, pipeline: Any, default: str) -> list[int] | None:
    """The labels asked for, checked before anything runs; None for an unconditional model.

    Args:
        options: with `labels`.
        pipeline: of the model.
        default: what no labels mean: "all" classes or the "first" ten.

    Raises:
        ConfigError: labels the model does not have.
    """
    from acdit.errors import ConfigError

    classes = pipeline.transformer.config.num_classes
    if classes is None:
        if options.labels:
            raise ConfigError("--labels", found=" ".join(options.labels), expected="none: this model is unconditional")
        return None
    asked = options.labels or [f"0-{(classes if default == 'all' else min(classes, 10)) - 1}"]
    indices: list[int] = []
    for text in asked:
        span = re.fullmatch(r"(\d+)-(\d+)", text)
        if span:
            indices += range(int(span[1]), int(span[2]) + 1)
        elif re.fullmatch(r"-?\d+", text):
            indices.append(int(text))
        else:
            indices += pipeline.get_label_ids(text)
    wrong = [index for index in indices if not 0 <= index < classes]
    if wrong:
        raise ConfigError("--labels", found=str(wrong[0]), expected=f"0 … {classes - 1}, the classes of this model")
    if not indices:
        raise ConfigError("--labels", found=" ".join(asked), expected="ranges that go up, like 0-9")
    return indices


def averaging_of(model: str) -> dict[str, Any]:
    """Which average of the weights a model folder holds, as far as its run's recipe tells."""
    from acdit.errors import AcditError
    from acdit.model_folder import beside_model
    from acdit.recipe import load_recipe

    recipe_file = beside_model(model, "recipe.yaml")
    if recipe_file is None:
        return {"decay": None, "source": "unknown: no recipe.yaml beside the model folder"}
    try:
        decays = load_recipe(str(recipe_file)).ema.decays
    except AcditError as error:
        return {"decay": None, "source": f"unknown: {error}"}
    return {"decay": decays[0] if decays else None, "source": "ema.decays of recipe.yaml beside the model folder"}
