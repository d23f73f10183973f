"""Autoencoders of diffusers, whatever their class: loading by folder or hub id, identity, scale, shape."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acdit.errors import ConfigError, first_line
from acdit.provenance import update_with_weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TINY_TILED = (4, 8)  # latent channels and spatial factor that diffusers' tiled AutoencoderTiny is written for


def load_vae(name: str, subfolder: str | None = None) -> Any:
    """A diffusers autoencoder of pictures, in fp32 and eval mode; its class is read from config.json.

    Only safetensors weights are read: the older .bin files are pickles.

    Args:
        name: a folder with config.json and safetensors weights, or a hub id.
        subfolder: where in it the autoencoder lies: "vae" in a saved pipeline.

    Returns:
        `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC` or another class of diffusers with `encode` and `decode`.

    Raises:
        ConfigError: there is none, it is no autoencoder or one of videos, or weights are missing or misshaped.
    """
    import diffusers

    what = f"vae {name}" + (f" (subfolder {subfolder})" if subfolder else "")
    place = Path(name, subfolder or "")
    if Path(name).exists() and not (place / "config.json").is_file():
        inside = (place / "vae" / "config.json").is_file()
        raise ConfigError(
            what, found=f"no config.json in {place}", expected="a folder of a saved diffusers autoencoder",
            fix="give the subfolder: vae" if inside else "check the path, and the subfolder (vae in saved pipelines)",
        )  # fmt: skip
    if not Path(name).exists() and not _HUB_ID.fullmatch(name):
        raise ConfigError(
            what, found="no such folder", expected="a folder of a saved autoencoder, or a hub id (owner/name)",
            fix="check the path",
        )  # fmt: skip
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        config = diffusers.AutoencoderKL.load_config(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            what, found=f"no such folder, and nothing on the hub ({first_line(error)})",
            expected="a folder, or a hub id, of a diffusers autoencoder", fix="check the path and the network",
        ) from error  # fmt: skip
    kind = config.get("_class_name")
    found: Any = getattr(diffusers, str(kind), None)
    model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    if not (model and hasattr(found, "encode") and hasattr(found, "decode")):
        raise ConfigError(
            f"{what}: _class_name", found=repr(kind), expected="a diffusers autoencoder, AutoencoderKL for instance"
        )
    try:
        vae, report = found.from_pretrained(name, **options, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # OSError: no weights; ValueError, RuntimeError: misshaped; SafetensorError: damaged
        raise ConfigError(
            what, found=f"weights that cannot be read ({first_line(error)})",
            expected=f"whole safetensors weights of {kind}",
            fix="save it anew with save_pretrained(…, safe_serialization=True); .bin files are not read",
        ) from error  # fmt: skip
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:  # diffusers would leave these at their random initialisation
        raise ConfigError(
            what, found=f"{len(wrong)} weights missing or misshaped ({', '.join(map(str, wrong[:3]))})",
            expected=f"all weights of {kind}", fix="use an undamaged copy",
        )  # fmt: skip
    require_frame_by_frame(vae)
    return vae.eval().requires_grad_(False)


def require_frame_by_frame(vae: Any) -> None:
    """Refuse an autoencoder that codes several frames together: clips are coded frame by frame.

    Raises:
        ConfigError: it convolves over time.
    """
    if any(isinstance(module, nn.Conv3d) for module in vae.modules()):
        raise ConfigError(
            f"vae: {type(vae).__name__}", found="an autoencoder of videos, which codes several frames together",
            expected="one of pictures: clips are coded frame by frame",
            fix="use AutoencoderKL, AutoencoderTiny, AutoencoderDC or another of pictures",
        )  # fmt: skip


def vae_sha256(vae: Any) -> str:
    """The identity of an autoencoder: its class, its settings and the bits of its weights (as fp32).

    Settings at their defaults do not count, so that a diffusers release that adds one changes no identity.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(vae).__init__).parameters.items()}
    settings = {
        key: value
        for key, value in dict(vae.config).items()
        if key in defaults and json.dumps(value) != json.dumps(defaults[key], default=str)
    }
    digest = hashlib.sha256(json.dumps([type(vae).__name__, settings], sort_keys=True).encode())
    update_with_weights(digest, vae, torch.float32)
    return digest.hexdigest()


@dataclass(frozen=True)
class LatentScale:
    """Latent z ↔ model space: (z − shift) · scale, and per channel ((z − mean) / std) · scale where those are given."""

    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, vae: Any) -> LatentScale:
        """As the autoencoder's config states it; what it does not state is 1 or 0.

        Raises:
            ConfigError: both a shift factor and a mean per channel, or as many numbers as there are no channels.
        """
        config = vae.config
        lists = {}
        for name in ("latents_mean", "latents_std"):
            values = getattr(config, name, None)
            lists[name] = None if values is None else tuple(float(value) for value in values)
            if values is not None and len(values) != latent_channels(vae):
                raise ConfigError(
                    f"vae: {name}", found=f"{len(values)} numbers", expected=f"{latent_channels(vae)}, one a channel"
                )
        scale = cls(
            float(getattr(config, "scaling_factor", None) or 1.0),
            float(getattr(config, "shift_factor", None) or 0.0),
            **lists,
        )
        if scale.shift_factor and scale.latents_mean is not None:
            raise ConfigError("vae: shift_factor, latents_mean", found="both", expected="one of the two")
        return scale

    def to_model(self, latent: Tensor) -> Tensor:
        """Latents (…, C, h, w) → model space."""
        return (latent - self._shift(latent)) * self._factor(latent)

    def std_to_model(self, std: Tensor) -> Tensor:
        """Standard deviations of latents (…, C, h, w) → model space."""
        return std * self._factor(std)

    def to_latent(self, data: Tensor) -> Tensor:
        """Model space (…, C, h, w) → latents."""
        return data / self._factor(data) + self._shift(data)

    def _shift(self, like: Tensor) -> Tensor | float:
        return self.shift_factor if self.latents_mean is None else _per_channel(self.latents_mean, like)

    def _factor(self, like: Tensor) -> Tensor | float:
        if self.latents_std is None:
            return self.scaling_factor
        return self.scaling_factor / _per_channel(self.latents_std, like)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def latent_channels(vae: Any) -> int:
    """Channels of its latents."""
    return int(vae.config.latent_channels)


def spatial_factor(vae: Any) -> int:
    """Pixels a latent cell, along each axis."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def set_memory_savers(vae: Any, *, tiling: bool = False, slicing: bool = False) -> None:
    """Code large pictures tile by tile (blended, so not bit-equal to the whole), and batches picture by picture.

    Raises:
        ConfigError: this autoencoder cannot.
    """
    kind = type(vae).__name__
    for wanted, name in ((tiling, "tiling"), (slicing, "slicing")):
        if wanted and not hasattr(vae, f"use_{name}"):
            raise ConfigError(f"vae {name}", found=f"a {kind}, which has none", expected="off")
    if tiling and kind == "AutoencoderTiny" and (latent_channels(vae), spatial_factor(vae)) != _TINY_TILED:
        raise ConfigError(
            "vae tiling", found=f"an AutoencoderTiny of {latent_channels(vae)} channels, factor {spatial_factor(vae)}",
            expected=f"off: diffusers tiles those of {_TINY_TILED[0]} channels and factor {_TINY_TILED[1]} only",
        )  # fmt: skip
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
