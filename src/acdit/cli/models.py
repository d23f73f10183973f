"""What the commands that draw pictures share: their options, and the model, solver and labels that these name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from acdit.cli.parser import positive

SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
FLOW_SOLVERS = ("dpm++", "unipc", "flow-euler")
DTYPES = ("fp32", "bf16", "fp16", "fp64")


def add_sampling_options(made: argparse.ArgumentParser) -> None:
    """Declare what a picture depends on."""
    made.add_argument("--labels", nargs="+", metavar="LABEL", help="class indices, ranges (0-9) or class names")
    made.add_argument("--steps", type=positive, default=25, help="solver steps a block (default 25)")
    made.add_argument("--guidance-scale", type=float, default=1.5, help="1 is off (default 1.5)")
    made.add_argument("--solver", choices=sorted(SOLVERS), help="default: the one saved with the model")
    made.add_argument("--seed", type=int, default=0, help="picture i gets seed + i (default 0)")
    made.add_argument("--batch-size", type=positive, default=64, help="pictures at once (default 64)")
    made.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
    made.add_argument("--device", help="default: cuda where there is one")


def load_pipeline(options: argparse.Namespace, device: Any = None) -> Any:
    """The pipeline that `options.model` names, with the asked dtype and solver.

    Raises:
        ConfigError: no such model, or a solver of another kind than the model was trained for.
    """
    import diffusers
    import torch

    from acdit import ACDiTPipeline
    from acdit.errors import ConfigError

    folder = Path(options.model)
    if not (folder / "model_index.json").is_file() and (
        folder.exists() or options.model.startswith((".", "/", "runs/"))
    ):
        raise ConfigError(
            f"model {options.model}", found="no model_index.json there", expected="the folder of a saved pipeline",
            fix="train one (make demo leaves runs/demo/model), or check the path",
        )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[options.dtype]
    try:
        pipeline = ACDiTPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(
            f"model {options.model}", found=f"no such folder, and no such model on the hub ({reason})",
            expected="a saved ACDiTPipeline", fix="make demo leaves one in runs/demo/model",
        ) from error  # fmt: skip
    if dtype != torch.float32:
        pipeline.transformer.to(dtype)
    if options.solver is not None:
        kind = getattr(pipeline.scheduler.config, "prediction_type", None)
        flow = kind == "flow_prediction" or type(pipeline.scheduler).__name__ == SOLVERS["flow-euler"]
        if flow != (options.solver in FLOW_SOLVERS) and (flow or options.solver == "flow-euler"):
            expected = ", ".join(FLOW_SOLVERS) if flow else ", ".join(sorted(set(SOLVERS) - {"flow-euler"}))
            raise ConfigError("--solver", found=options.solver, expected=f"one that fits this model: {expected}")
        extra = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if flow else {}
        if options.solver == "flow-euler":
            extra = {}
        solver = getattr(diffusers, SOLVERS[options.solver])
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config, **extra)
    return pipeline.to(device or options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    from acdit.recipe import load_recipe

    recipe_file = Path(model).parent / "recipe.yaml"
    if not recipe_file.is_file():
        return {"decay": None, "source": "unknown: no recipe.yaml beside the model folder"}
    try:
        decays = load_recipe(str(recipe_file)).ema.decays
    except AcditError as error:
        return {"decay": None, "source": f"unknown: {error}"}
    return {"decay": decays[0] if decays else None, "source": "ema.decays of recipe.yaml beside the model folder"}
