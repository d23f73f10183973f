"""Codecs: what stands between files and model space. Each owns its scaling."""

from acdit.codecs.pixels import PixelCodec
from acdit.codecs.vae import VAECodec

__all__ = ["PixelCodec", "VAECodec"]
