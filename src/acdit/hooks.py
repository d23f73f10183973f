"""Offloading, for what a module does besides `forward`.

accelerate and diffusers move or cast weights in hooks around `forward`. The model's verbs are methods of their own, so
their hooks are run here, and what a weight says about its device is not taken for where the work is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])


def is_hooked(module: nn.Module) -> bool:
    """Whether weights may be elsewhere, or of another dtype, outside the module's calls."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def under_hooks(method: Method) -> Method:
    """A module's method that runs inside the hooks of its `forward`, those of accelerate and those of diffusers."""

    @functools.wraps(method)
    def run(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        if not is_hooked(module):
            return method(module, *arguments, **options)
        hooks = _outermost_first(module)
        for hook in hooks:
            arguments, options = hook.pre_forward(module, *arguments, **options)
        output = method(module, *arguments, **options)
        for hook in reversed(hooks):
            output = hook.post_forward(module, output)
        return output

    return cast(Method, run)


def execution_device(model: nn.Module, weight: torch.Tensor, owner: nn.Module) -> torch.device:
    """Where a model computes, also while its weights are offloaded.

    Args:
        model: a diffusers model.
        weight: one of its weights; it says where, if nothing is offloaded.
        owner: the module that the weight belongs to.
    """
    for module in (model, owner):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    if hasattr(model, "_diffusers_hook") or hasattr(owner, "_diffusers_hook"):
        return torch.device(cast(Any, model).device)  # diffusers looks up where group offloading computes
    return weight.device


def _outermost_first(module: nn.Module) -> list[Any]:
    hooks = [module._hf_hook] if hasattr(module, "_hf_hook") else []
    registry: Any = getattr(module, "_diffusers_hook", None)
    return hooks + ([] if registry is None else list(reversed(registry.hooks.values())))
