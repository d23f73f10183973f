"""Tiny autoencoders and folders of pictures that the tests of latents share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image

from acdit.cli import main


def kl(seed: int = 0, **options: Any) -> AutoencoderKL:
    """Factor 2, a few thousand random weights; latents of about unit variance once scaled."""
    torch.manual_seed(seed)
    settings = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (8, 8),
        "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "scaling_factor": 5.0, "shift_factor": 0.1, "sample_size": 16,
        "mid_block_add_attention": False,
    }  # fmt: skip
    return AutoencoderKL(**{**settings, **options}).eval()


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip


def dc() -> AutoencoderDC:
    torch.manual_seed(0)
    widths, none = (8, 8, 16), ((), (), ())
    return AutoencoderDC(
        latent_channels=32, attention_head_dim=4, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none, scaling_factor=0.41, encoder_out_shortcut=False, decoder_in_shortcut=False,
    ).eval()  # fmt: skip


def vq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
    ).eval()  # fmt: skip


def picture_folder(root: Path, classes: int = 2, per_class: int = 5, edge: int = 20) -> Path:
    """Random colour pictures of several sizes, one folder a class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class-{label}").mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 256, (edge + index, edge + 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class-{label}" / f"{index}.png")
    return root


def two_encodings(base: Path) -> Path:
    """In `base`: pictures, vae, and two encodings of them, mode (bf16) and moments (fp32), both views."""
    picture_folder(base / "pictures")
    kl().save_pretrained(base / "vae")
    for posterior, dtype in (("mode", "bf16"), ("moments", "fp32")):
        arguments = ["encode", str(base / "pictures"), "--vae", str(base / "vae"), "--size", "16", "--flips"]
        arguments += ["--posterior", posterior, "--dtype", dtype, "--shard-size", "4", "--device", "cpu"]
        assert main([*arguments, "--output", str(base / posterior)]) == 0
    return base
