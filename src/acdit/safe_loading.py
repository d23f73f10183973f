"""Loading from folders, the hub and the package without pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from acdit import builtin
from acdit.errors import ConfigError
from acdit.shims import PIPELINES, class_name


class SafetensorsOnly:
    """Put before a diffusers base class: no pickle is read by accident, and built-in models have names."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, use_safetensors: bool | None = None, **options: Any
    ) -> Any:
        """diffusers' own, for a folder, a hub id or a built-in model's name; weights come from safetensors unless
        `use_safetensors=False` is written out.

        Raises:
            ConfigError: a folder of text asked for as pictures, or the other way round.
        """
        name = builtin.located(pretrained_model_name_or_path)
        if cls.__name__ in PIPELINES:
            _require_kind(cls.__name__, Path(name))
        safe = True if use_safetensors is None else use_safetensors
        base: Any = super()  # diffusers' class, which this one stands before
        return base.from_pretrained(name, use_safetensors=safe, **options)


def _require_kind(kind: str, folder: Path) -> None:
    try:
        name = class_name(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return  # of the hub, or damaged: diffusers has its words for it
    if name in PIPELINES and name != kind:
        raise ConfigError(f"model {folder}", found=f"an {name}", expected=f"an {kind}", fix=f"{name}.from_pretrained")
