"""Recipe → the codec of a run, checked against the autoencoder and against what was cached."""

from __future__ import annotations

from typing import Any

from acdit.codecs import CachedLatentsCodec, PixelCodec, TokenIdsCodec, VAECodec, load_vae
from acdit.codecs.autoencoders import set_memory_savers
from acdit.data.build import Dataset
from acdit.data.latents import LatentsDataset, VAEIdentity
from acdit.data.stream import StreamDataset
from acdit.errors import ConfigError
from acdit.recipe import CodecRecipe, Recipe

Codec = PixelCodec | VAECodec | CachedLatentsCodec | TokenIdsCodec
_CACHED = "the latents"


def build_codec(recipe: Recipe, dataset: Dataset | StreamDataset) -> tuple[Codec, Any]:
    """The codec, and the autoencoder that the published pipeline decodes with (None without one).

    Raises:
        ConfigError: settings that do not fit together; an autoencoder that is not the one the latents were made with,
            or not the one the recipe describes: everything that differs is listed.
    """
    if recipe.model.vocab_size is not None:
        if recipe.codec != CodecRecipe():
            raise ConfigError("codec", found=f"kind {recipe.codec.kind!r}", expected="its defaults: tokens need none")
        return TokenIdsCodec(), None
    cached = isinstance(dataset, LatentsDataset)
    _require_fitting_kinds(recipe, cached)
    if recipe.codec.kind == "pixels":
        return PixelCodec(recipe.codec.mean, recipe.codec.std), None
    vae: Any = None
    if recipe.codec.vae is not None:
        vae = load_vae(recipe.codec.vae, recipe.codec.subfolder)
        set_memory_savers(vae, tiling=recipe.codec.tiling, slicing=recipe.codec.slicing)
    if isinstance(dataset, LatentsDataset):
        _require_same_vae(recipe.codec, vae, dataset)
        dataset.manifest.warn_about_std()
        drawn = recipe.codec.posterior == "sample" and dataset.manifest.posterior == "moments"
        return CachedLatentsCodec("sample" if drawn else "mode"), vae
    identity = VAEIdentity.of(vae, str(recipe.codec.vae), recipe.codec.subfolder)
    _require_described(recipe.codec, identity, f"vae {recipe.codec.vae}")
    channels = int(getattr(vae.config, "in_channels", 3))
    if channels != dataset.shape[0]:
        raise ConfigError(
            "data.channels", found=str(dataset.shape[0]), expected=f"{channels}, as the autoencoder reads"
        )
    return VAECodec(vae, recipe.codec.posterior), vae


def data_shape(dataset: Dataset | StreamDataset, codec: Codec) -> tuple[int, ...]:
    """(C, [T,] H, W) of a sample in model space."""
    return codec.model_shape(dataset.shape) if isinstance(codec, VAECodec) else dataset.shape


def _require_fitting_kinds(recipe: Recipe, cached: bool) -> None:
    codec = recipe.codec
    if codec.kind == "pixels":
        if cached:
            raise ConfigError("codec.kind", found="'pixels', for latents", expected="'vae'", fix="set codec.kind=vae")
        unused = {
            "vae": None, "subfolder": None, "posterior": "mode", "scaling_factor": None, "shift_factor": None,
            "vae_sha256": None, "tiling": False, "slicing": False,
        }  # fmt: skip
        for name, default in unused.items():
            if getattr(codec, name) != default:
                raise ConfigError(
                    f"codec.{name}", found=repr(getattr(codec, name)), expected=f"{default}: codec.kind is pixels",
                    fix="set codec.kind=vae",
                )  # fmt: skip
        return
    if (codec.mean, codec.std) != (0.5, 0.5):
        raise ConfigError(
            "codec.mean, codec.std", found=f"{codec.mean}, {codec.std}",
            expected="their defaults: the autoencoder has a scale of its own",
        )  # fmt: skip
    if codec.vae is not None:
        return
    if not cached:
        raise ConfigError(
            "codec.vae", found="nothing", expected="a folder or hub id of a diffusers autoencoder",
            fix="add codec.vae=PATH, or encode the pictures first (acdit encode) and set data.kind=latents",
        )  # fmt: skip
    for name in ("subfolder", "tiling", "slicing"):
        if getattr(codec, name):
            raise ConfigError(f"codec.{name}", found=repr(getattr(codec, name)), expected="nothing without codec.vae")
    if recipe.train.sample_every is not None:
        raise ConfigError(
            "train.sample_every", found=f"{recipe.train.sample_every}, and no codec.vae to decode with",
            expected="null, or an autoencoder", fix="add codec.vae=PATH, or set train.sample_every=null",
        )  # fmt: skip


def _require_same_vae(codec: CodecRecipe, vae: Any, dataset: LatentsDataset) -> None:
    made_with = dataset.manifest.vae
    _require_described(codec, made_with, f"{_CACHED} in {dataset.root}")
    if vae is None:
        return
    given = VAEIdentity.of(vae, str(codec.vae), codec.subfolder)
    names = ("class_name", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "sha256")
    different = [
        f"{name} {_short(getattr(given, name))} (latents: {_short(getattr(made_with, name))})"
        for name in names
        if getattr(given, name) != getattr(made_with, name)
    ]
    if different:
        raise ConfigError(
            f"codec.vae {codec.vae}", found=f"another autoencoder than {_CACHED} in {dataset.root} were made with: "
            + ", ".join(different),
            expected=f"{made_with.id}, as encoded", fix="name that autoencoder, or encode anew with this one",
        )  # fmt: skip


def _require_described(codec: CodecRecipe, found: VAEIdentity, what: str) -> None:
    """The recipe may say what the autoencoder must be."""
    for name, value in (
        ("scaling_factor", found.scaling_factor),
        ("shift_factor", found.shift_factor),
        ("vae_sha256", found.sha256),
    ):
        wanted = getattr(codec, name)
        if wanted not in (None, value):
            raise ConfigError(
                f"codec.{name}", found=f"{_short(wanted)} in the recipe and {_short(value)} in {what}",
                expected="the same", fix="use the autoencoder that the recipe describes, or change the recipe",
            )  # fmt: skip


def _short(value: Any) -> str:
    return f"{value:.60}" if isinstance(value, str) else f"{value!s:.120}"
