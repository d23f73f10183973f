"""DiT's released weights (facebookresearch/DiT) → a folder that diffusers' `DiTPipeline` loads: ACDiT's baseline.

The file is read by `acdit.pickles`, which runs none of its code; names and shapes of all weights must be exactly those
of a DiT of the sizes they imply, and nothing is written unless they are.

    import acdit.dit                                          # the folder names the class below
    pipeline = DiTPipeline.from_pretrained("models/dit-xl-2-256")
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers looks for it where a class is found)
from torch import Tensor

from acdit.codecs import load_vae
from acdit.errors import ConfigError, DataError, StorageError
from acdit.pickles import describe, load_checkpoint, plain_tensors, require_shapes
from acdit.storage import atomic_directory

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of DiT-S, B, L and XL by width: no weight's shape says them."""
_SIGNATURE = "x_embedder.proj.weight"
_FREQUENCIES = 256


class DiTTransformer(DiTTransformer2DModel):
    """diffusers' DiT with the two things in which it is not the released one put right.

    Its sinusoid of the timestep has frequencies 10000^(−i/128) as the weights were trained with (diffusers' has
    10000^(−i/127)), and its table of positions is a part of the weights instead of being computed again.

    Args: those of `DiTTransformer2DModel`, with DiT's own defaults.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            num_attention_heads, attention_head_dim, in_channels, out_channels, num_layers, dropout, norm_num_groups,
            attention_bias, sample_size, patch_size, activation_fn, num_embeds_ada_norm, upcast_attention, norm_type,
            norm_elementwise_affine, norm_eps,
        )  # fmt: skip
        self.pos_embed.register_buffer("pos_embed", self.pos_embed.pos_embed, persistent=True)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0


def state_dict_of(content: Any) -> Mapping[Any, Any] | None:
    """The DiT state dict of an unpickled file: the file itself, or its "ema" or "model" as DiT's training saves them
    (the average first, as DiT's own sampling does); None: it holds none."""
    if not isinstance(content, dict):
        return None
    for state in (content, content.get("ema"), content.get("model")):
        if isinstance(state, dict) and _SIGNATURE in state:
            return state
    return None


def convert_dit(
    checkpoint: str | Path, output: str | Path, vae: str | Path | None = None, heads: int | None = None
) -> dict[str, Any]:
    """Convert a DiT checkpoint to a pipeline folder; it appears at once, or not at all.

    Args:
        checkpoint: DiT's `.pt`.
        output: the folder to make; it must not exist.
        vae: folder of the `AutoencoderKL` to put into the pipeline; without one, hand it in when loading:
            `DiTPipeline.from_pretrained(output, vae=…)`.
        heads: attention heads, where the width is not one of `HEADS`.

    Returns:
        The transformer's config.

    Raises:
        DataError: no DiT checkpoint, unsafe to read, or weights that do not fit; nothing is written.
        ConfigError: unknown heads, an autoencoder of other channels.
        StorageError: the folder exists or cannot be written.
    """
    path = Path(checkpoint)
    if Path(output).exists():
        raise StorageError(f"{output} exists", expected="a new folder", fix="choose another output, or remove it")
    content = load_checkpoint(path)
    state = state_dict_of(content)
    if state is None:
        raise DataError(f"{path}: no DiT checkpoint", found=describe(content), expected=f"weights with {_SIGNATURE}")
    weights = plain_tensors(path, state)
    config = _sizes(path, weights, heads)
    require_shapes(
        path, _shapes(config), weights, f"a DiT of {config['num_layers']} blocks",
        "convert the checkpoint as DiT's authors released or DiT's training saved it",
    )  # fmt: skip
    autoencoder = None if vae is None else _autoencoder(vae, config["in_channels"])
    with torch.device("meta"):
        transformer = DiTTransformer(**config)
    transformer.load_state_dict(_renamed(weights, config["num_layers"]), assign=True)
    index = {
        "_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["acdit.dit", "DiTTransformer"],
        "vae": [None, None] if autoencoder is None else ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    with atomic_directory(Path(output)) as folder:
        transformer.save_pretrained(folder / "transformer")
        scheduler.save_pretrained(folder / "scheduler")
        if autoencoder is not None:
            autoencoder.save_pretrained(folder / "vae")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return config


def _sizes(path: Path, weights: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The transformer's config from shapes."""
    depth = len({match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))})
    table, final = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    wanted = {_SIGNATURE: 4, "pos_embed": 3, table: 2, final: 2}
    wrong = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'missing'}"
        for name, ndim in wanted.items()
        if name not in weights or weights[name].ndim != ndim or 0 in weights[name].shape
    ]
    if wrong or not depth:
        raise DataError(
            f"{path}: weights", found="; ".join(wrong) or "no blocks", expected="the names and axes of a DiT"
        )
    width, channels, patch, _ = weights[_SIGNATURE].shape
    side = math.isqrt(weights["pos_embed"].shape[1])
    if heads is None and width not in HEADS:
        raise ConfigError(
            "heads", found=f"a DiT of width {width}", expected=f"a width of {sorted(HEADS)}", fix="give --heads"
        )
    count = heads or HEADS[width]
    if width % count:
        raise ConfigError("heads", found=str(count), expected=f"a divisor of the width {width}")
    return {
        "num_attention_heads": count, "attention_head_dim": width // count, "in_channels": channels,
        "out_channels": weights[final].shape[0] // patch**2, "num_layers": depth, "sample_size": side * patch,
        "patch_size": patch, "num_embeds_ada_norm": weights[table].shape[0] - 1,
    }  # fmt: skip


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """DiT's names and shapes for a config."""
    w = config["num_attention_heads"] * config["attention_head_dim"]
    patch, depth = config["patch_size"], config["num_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        _SIGNATURE: (w, config["in_channels"], patch, patch),
        "x_embedder.proj.bias": (w,),
        "pos_embed": (1, (config["sample_size"] // patch) ** 2, w),
        "y_embedder.embedding_table.weight": (config["num_embeds_ada_norm"] + 1, w),
    }
    linears = {
        "t_embedder.mlp.0": (w, _FREQUENCIES),
        "t_embedder.mlp.2": (w, w),
        "final_layer.linear": (patch**2 * config["out_channels"], w),
        "final_layer.adaLN_modulation.1": (2 * w, w),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * w, w),
            f"blocks.{i}.attn.proj": (w, w),
            f"blocks.{i}.mlp.fc1": (4 * w, w),
            f"blocks.{i}.mlp.fc2": (w, 4 * w),
            f"blocks.{i}.adaLN_modulation.1": (6 * w, w),
        }
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


def _renamed(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """DiT's weights under diffusers' names; its one pair of embedders is repeated in every block."""
    renamed = {
        "pos_embed.pos_embed": weights["pos_embed"],
        **_linear(weights, "x_embedder.proj", "pos_embed.proj"),
        **_linear(weights, "final_layer.adaLN_modulation.1", "proj_out_1"),
        **_linear(weights, "final_layer.linear", "proj_out_2"),
    }
    for i in range(depth):
        theirs, block = f"blocks.{i}", f"transformer_blocks.{i}"
        embedder = f"{block}.norm1.emb"
        renamed |= {
            **_linear(weights, "t_embedder.mlp.0", f"{embedder}.timestep_embedder.linear_1"),
            **_linear(weights, "t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2"),
            f"{embedder}.class_embedder.embedding_table.weight": weights["y_embedder.embedding_table.weight"],
            **_linear(weights, f"{theirs}.adaLN_modulation.1", f"{block}.norm1.linear"),
            **_linear(weights, f"{theirs}.attn.proj", f"{block}.attn1.to_out.0"),
            **_linear(weights, f"{theirs}.mlp.fc1", f"{block}.ff.net.0.proj"),
            **_linear(weights, f"{theirs}.mlp.fc2", f"{block}.ff.net.2"),
        }
        for kind in ("weight", "bias"):
            parts = weights[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            renamed |= {f"{block}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    # Blocks' embedders and the parts of qkv share memory, which safetensors does not write.
    return {name: value.clone() for name, value in renamed.items()}


def _linear(weights: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _autoencoder(folder: str | Path, channels: int) -> AutoencoderKL:
    vae = load_vae(str(folder))
    if not isinstance(vae, AutoencoderKL) or vae.config.latent_channels != channels:
        raise ConfigError(
            f"vae {folder}", found=f"{type(vae).__name__}, {vae.config.latent_channels} latent channels",
            expected=f"an AutoencoderKL with {channels}, as the DiT has",
        )  # fmt: skip
    return vae
