"""Codecs: what stands between files and model space. Each owns its scaling."""

from acdit.codecs.autoencoders import LatentScale, load_vae, spatial_factor, vae_sha256
from acdit.codecs.cached import CachedLatentsCodec
from acdit.codecs.pixels import PixelCodec
from acdit.codecs.tokens import TokenIdsCodec
from acdit.codecs.vae import VAECodec

__all__ = [
    "CachedLatentsCodec",
    "LatentScale",
    "PixelCodec",
    "TokenIdsCodec",
    "VAECodec",
    "load_vae",
    "spatial_factor",
    "vae_sha256",
]
