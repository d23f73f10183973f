"""Loading from folders and the hub without pickles."""

from __future__ import annotations

from typing import Any


class SafetensorsOnly:
    """Put before a diffusers base class: no pickle is read by accident."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, use_safetensors: bool | None = None, **options: Any
    ) -> Any:
        """diffusers' own, but weights come from safetensors unless `use_safetensors=False` is written out."""
        safe = True if use_safetensors is None else use_safetensors
        base: Any = super()  # diffusers' class, which this one stands before
        return base.from_pretrained(pretrained_model_name_or_path, use_safetensors=safe, **options)
