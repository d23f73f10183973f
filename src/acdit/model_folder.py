"""What a saved pipeline's folder tells a recipe that starts from it. JSON only: no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from acdit.errors import ConfigError
from acdit.recipe import CorruptionRecipe, ModelRecipe, flatten

_SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def overrides_from(folder: str | Path) -> list[str]:
    """Overrides of a recipe that make its model, schedule and pixel scale those of a saved pipeline, and start from it.

    Args:
        folder: a run's model/, as `ACDiTPipeline.save_pretrained` leaves it.

    Raises:
        ConfigError: no such folder, or a model of text.
    """
    folder = Path(folder)
    index, config = _read(folder, "model_index.json"), _read(folder, "transformer/config.json")
    if config.get("vocab_size") is not None or index.get("_class_name") != "ACDiTPipeline":
        raise ConfigError(
            f"model {folder}", found=str(index.get("_class_name")), expected="an ACDiTPipeline: pictures or clips"
        )
    fields = ModelRecipe.__dataclass_fields__
    model = {name: value for name, value in config.items() if name in fields}
    ndim = len(model["grid"])
    model["patch"] = [model["patch"]] * ndim if isinstance(model.get("patch"), int) else model.get("patch")
    wanted: dict[str, Any] = {"train.init_from": str(folder)}
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


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {folder}", found=f"{name}: {type(error).__name__}", expected="the folder of a saved ACDiTPipeline",
            fix="a run's model/ (make demo leaves runs/demo/model)",
        ) from None  # fmt: skip
    return dict(found)
