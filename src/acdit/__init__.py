"""Blockwise autoregressive diffusion transformers (ACDiT, arXiv 2412.07720)."""

from acdit.cache import KVCache
from acdit.layout import BlockLayout
from acdit.model import ACDiTTransformer
from acdit.pipelines import ACDiTPipeline

__version__ = "0.1.0"

__all__ = ["ACDiTPipeline", "ACDiTTransformer", "BlockLayout", "KVCache", "__version__"]
