"""Codecs: what stands between files and model space. Each owns its scaling."""

from acdit.codecs.autoencoders import LatentScale, load_vae, spatial_factor, vae_sha256
from acdit.codecs.cached import CachedLatentsCodec
from acdit.codecs.pixels import PixelCodec
from acdit.codecs.text import CharacterTokenizer, SubwordTokenizer, Tokenizer, TokenStream, require_vocabulary
from acdit.codecs.tokenizer_files import load_tokenizer
from acdit.codecs.tokens import TokenIdsCodec
from acdit.codecs.vae import VAECodec

__all__ = [
    "CachedLatentsCodec",
    "CharacterTokenizer",
    "LatentScale",
    "PixelCodec",
    "SubwordTokenizer",
    "TokenIdsCodec",
    "TokenStream",
    "Tokenizer",
    "VAECodec",
    "load_tokenizer",
    "load_vae",
    "require_vocabulary",
    "spatial_factor",
    "vae_sha256",
]
