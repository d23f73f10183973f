"""Runs the reference (thunlp/ACDiT) from a checkout, beside ours. None of its code is kept here: it is imported at run
time, with three things done from outside:

- timm's `Attention` and `Mlp`, which it derives from, are stood in for by containers of the same attributes;
- its compiled FlexAttention is switched off, so it attends through its dense mask;
- where fp64 is compared, its own casts to fp32 are lifted by `LiftedCasts`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILES = ("models.py", "rope.py")


class StandInAttention(nn.Module):
    """The attributes that the reference expects of timm's attention; it brings its own forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj_drop = nn.Dropout(0.0)


class StandInMlp(nn.Sequential):
    """Two linears with an activation between them, under timm's names."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0
    ) -> None:
        super().__init__()
        if drop:
            raise ValueError(f"the reference asks for dropout {drop}; the stand-in has none")
        self.add_module("fc1", nn.Linear(in_features, hidden_features))
        self.add_module("act", act_layer())
        self.add_module("fc2", nn.Linear(hidden_features, in_features))


def load_reference(checkout: Path) -> ModuleType:
    """Import `models.py` of a checkout of the reference, with dense attention.

    Raises:
        SystemExit: the path holds no such files.
    """
    missing = [name for name in FILES if not (checkout / name).is_file()]
    if missing:
        raise SystemExit(f"--reference {checkout}: no {', '.join(missing)} there; give a checkout of thunlp/ACDiT")
    timm, models, transformer = (ModuleType(name) for name in ("timm", "timm.models", "timm.models.vision_transformer"))
    # A module made here has no attributes that a type checker knows.
    transformer.Attention, transformer.Mlp = StandInAttention, StandInMlp  # type: ignore[attr-defined]
    stand_ins = {part.__name__: part for part in (timm, models, transformer)}
    held = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))
    try:
        spec = importlib.util.spec_from_file_location("acdit_reference_models", checkout / "models.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the reference imports {error.name}, which is not installed: pip install {error.name}"
        ) from None
    finally:
        sys.path.remove(str(checkout))
        for name, previous in held.items():
            if previous is None:
                del sys.modules[name]
            else:
                sys.modules[name] = previous
    module.USE_FLEX_ATTENTION = False  # type: ignore[attr-defined]  # its own switch
    return module


def describe_reference(checkout: Path) -> str:
    """Commit of the checkout where git knows it, and the sha256 of the two files that matter."""
    digests = [f"{name} sha256 {hashlib.sha256((checkout / name).read_bytes()).hexdigest()[:16]}" for name in FILES]
    # `git -C` would answer with the commit of any repository further up.
    if (checkout / ".git").exists():
        commit = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        digests.insert(0, f"commit {commit}")
    return ", ".join(digests)


def build_reference(
    module: ModuleType,
    args: Namespace,
    *,
    hidden_size: int,
    depth: int,
    num_classes: int,
    mlp_ratio: float = 4.0,
    head_dim: int = 64,
) -> nn.Module:
    """A reference model from the arguments that a released checkpoint carries, as its sampling scripts build one."""
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.ACDiT(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=hidden_size // head_dim,
            mlp_ratio=mlp_ratio,
            latent_size=args.vae_latent_size * args.patch_size**2,
            block_size=args.block_size,
            num_classes=num_classes,
            ar_len=args.ar_len,
            temporal_len=args.num_frames,
            spatial_len=(args.image_size // args.vae_patch_pixels // args.patch_size) ** 2,
            nd_split=args.nd_split,
            square_block=args.square_block,
        )
    # It drops labels even in eval mode; a comparison must not.
    model.y_embedder.dropout_prob = 0.0
    return model


@torch.no_grad()
def perturb(model: nn.Module, seed: int, strength: float = 1.0) -> None:
    """Random weights everywhere, the zero-initialised layers included: both sides would answer zero otherwise.

    Matrices get fan-in scaled normals, norms 1 ± 0.1, biases 0.1; the adaLN and output layers are smaller by
    `strength`-scaled factors so that activations stay of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            draw = draw / math.sqrt(parameter.shape[1])
            draw = draw * (0.5 * strength if "odulation" in name or name.startswith("final_layer") else 1.0)
        elif "norm" in name:
            draw = 1 + 0.1 * draw
        else:
            draw = 0.1 * draw
        parameter.copy_(draw)


class LiftedCasts(TorchFunctionMode):
    """Lets fp64 stay fp64 where code asks for fp32: `.float()`, `.to(torch.float32)` and default-dtype `linspace`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace and "dtype" not in kwargs:
            kwargs = {**kwargs, "dtype": torch.float64}
        is_cast = func is torch.Tensor.float or (
            func is torch.Tensor.to and any(value is torch.float32 for value in (*args[1:], *kwargs.values()))
        )
        if is_cast and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


def reference_forward(
    model: nn.Module, clean: Tensor, noisy: Tensor, timestep: Tensor, labels: Tensor, lifted: bool
) -> Tensor:
    """The reference's training forward, (B, N, L, D) like `noisy`."""
    with LiftedCasts() if lifted else contextlib.nullcontext():
        return model(clean, noisy, timestep, labels).reshape(noisy.shape)


@torch.no_grad()
def reference_sample(
    module: ModuleType,
    model: nn.Module,
    scheduler: Any,
    labels: Tensor,
    noises: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    lifted: bool,
) -> Tensor:
    """The reference's own blocks × steps loop started from given noises.

    Args:
        noises: (N, B, L, D) in the model's dtype, one initial noise a block.

    Returns:
        (B, N, L, D).
    """
    remaining = iter(noises)
    drawn = module.randn_tensor
    # It draws by this name; the given noises take the place of what it would draw. (An imported module is not typed.)
    module.randn_tensor = lambda shape, **_: next(remaining).reshape(shape)  # type: ignore[attr-defined]
    try:
        with LiftedCasts() if lifted else contextlib.nullcontext():
            return model.sample(
                labels,
                scheduler,
                num_inference_steps,
                cfg=guidance_scale,
                target_shape=(noises.shape[1], noises.shape[0], *noises.shape[2:]),
                dtype=noises.dtype,
            )
    finally:
        module.randn_tensor = drawn  # type: ignore[attr-defined]  # as above
