"""Runs MAR (LTH14/mar, arXiv 2406.11838) from a checkout, beside ours. None of its code is kept here: it is imported at
run time, with two things done from outside:

- timm's transformer layer, which it imports, is stood in for by a layer of the same products and the same fused
  attention;
- without CUDA, `Tensor.cuda()`, which its sampling calls, answers with the tensor itself.

Nothing else is changed. 1024 and 4096 tokens are its own argument `img_size` (512 and 1024, at its stride of 16).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from reference import StandInAttention, StandInMlp
from torch import Tensor, nn

FILES = ("models/mar.py", "models/diffloss.py", "diffusion/gaussian_diffusion.py")
STRIDE = 16
"""Of its autoencoder: pixels a token."""
DIFFUSION_DEPTH = 3
"""Layers of the MLP that draws tokens, its constructor's default."""


class StandInBlock(nn.Module):
    """timm's layer under timm's names: norm, attention, norm, MLP, each added to its input.

    Args:
        dim: width W.
        num_heads: heads.
        mlp_ratio: inner width of the MLP over W.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop, attn_drop: dropout, which sampling does not have; taken and left out.
        norm_layer: makes a norm of W features.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        del proj_drop, attn_drop
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = StandInAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.mlp = StandInMlp(dim, int(dim * mlp_ratio), nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, W) → (B, S, W)."""
        if self.training:
            raise RuntimeError("the stand-in for timm's layer has no dropout: it only samples")
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.num_heads, self.attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def load_mar(checkout: Path) -> ModuleType:
    """Import `models.mar` of a checkout.

    Raises:
        SystemExit: the path holds no such files, or one of their imports is missing.
    """
    require_mar(checkout)
    timm, models, transformer = (ModuleType(name) for name in ("timm", "timm.models", "timm.models.vision_transformer"))
    transformer.Block = StandInBlock  # type: ignore[attr-defined]  # a module made here has no attributes to check
    sys.modules.update({part.__name__: part for part in (timm, models, transformer)})
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("models.mar")
    except ModuleNotFoundError as error:
        raise SystemExit(f"MAR imports {error.name}, which is not installed: pip install {error.name}") from None
    finally:
        sys.path.remove(str(checkout))


def require_mar(checkout: Path) -> None:
    """Refuse, before anything is measured, a path that is no checkout."""
    missing = [name for name in FILES if not (checkout / name).is_file()]
    if missing:
        raise SystemExit(f"--mar {checkout}: no {', '.join(missing)} there; give a checkout of LTH14/mar")


def describe_mar(checkout: Path) -> str:
    """The sha256 of the files that matter."""
    digests = (f"{name} sha256 {hashlib.sha256((checkout / name).read_bytes()).hexdigest()[:16]}" for name in FILES)
    return "LTH14/mar, " + ", ".join(digests)


def diffusion_width(parameters: int, depth: int, width: int) -> int:
    """Width of MAR's MLP, a multiple of 64, that brings its parameters near a number; its learned positions aside.

    Its encoder and decoder of `depth` layers each have 12·W² a layer. The MLP has 5 products of its width w² a layer,
    and at its ends 3·w² and what joins it to W and to the timestep's 256 frequencies.
    """

    def count(mlp: int) -> float:
        backbone = 24 * depth * width**2 + 1000 * width  # classes
        return backbone + (5 * DIFFUSION_DEPTH + 3) * mlp**2 + mlp * (width + 256)

    most = 64 * (1 + math.isqrt(parameters) // 64)
    return min(range(64, most + 64, 64), key=lambda mlp: abs(count(mlp) - parameters))


def build_mar(
    checkout: Path,
    *,
    tokens: int,
    width: int,
    depth: int,
    heads: int,
    mlp_width: int,
    mlp_depth: int = DIFFUSION_DEPTH,
    num_classes: int = 1000,
    diffusion_steps: int = 100,
) -> nn.Module:
    """A MAR with the random weights of its own initialisation, in evaluation mode.

    Args:
        checkout: of LTH14/mar.
        tokens: S, a square number.
        width, heads: of encoder and decoder.
        depth: layers of the encoder, and again of the decoder.
        mlp_width, mlp_depth: of the MLP that draws tokens.
        num_classes: classes of the label embedding.
        diffusion_steps: with which the MLP draws.
    """
    sizes = {f"{part}_embed_dim": width for part in ("encoder", "decoder")}
    sizes |= {f"{part}_depth": depth for part in ("encoder", "decoder")}
    sizes |= {f"{part}_num_heads": heads for part in ("encoder", "decoder")}
    model = load_mar(checkout).MAR(
        img_size=STRIDE * math.isqrt(tokens),
        **sizes,
        diffloss_w=mlp_width,
        diffloss_d=mlp_depth,
        class_num=num_classes,
        num_sampling_steps=str(diffusion_steps),
    )
    return model.eval()


@contextlib.contextmanager
def cuda_answers_itself() -> Iterator[None]:
    """Where there is no CUDA, `tensor.cuda()` is the tensor."""
    if torch.cuda.is_available():
        yield
        return
    held = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign, assignment]  # as its code calls it
    try:
        yield
    finally:
        torch.Tensor.cuda = held  # type: ignore[method-assign]  # torch's own again


@torch.no_grad()
def mar_sample(model: nn.Module, *, batch: int, iterations: int, guidance_scale: float, seed: int) -> Tensor:
    """Pictures from its own `sample_tokens`, (B, 16, h, w) latents, guided with its linear schedule.

    On CUDA under the autocast that its evaluation uses (fp16 over fp32 weights); on CPU in fp32.
    """
    np.random.seed(seed)
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    labels = torch.randint(model.num_classes, (batch,), device=device)
    with cuda_answers_itself(), torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
        return model.sample_tokens(
            bsz=batch, num_iter=iterations, cfg=guidance_scale, cfg_schedule="linear", labels=labels
        )
