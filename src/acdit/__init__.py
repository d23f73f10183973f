"""Blockwise autoregressive diffusion transformers (ACDiT, arXiv 2412.07720).

Names are imported when they are first used, so that `acdit --help` and reading a recipe need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acdit.cache import KVCache
    from acdit.classifiers import ACDiTClassifier
    from acdit.layout import BlockLayout
    from acdit.model import ACDiTTransformer
    from acdit.pipelines import ACDiTPipeline
    from acdit.pipelines_text import ACDiTTextPipeline
    from acdit.sampling import sample_blocks
    from acdit.text_sampling import sample_tokens

__version__ = "0.1.0"

__all__ = [
    "ACDiTClassifier",
    "ACDiTPipeline",
    "ACDiTTextPipeline",
    "ACDiTTransformer",
    "BlockLayout",
    "KVCache",
    "__version__",
    "sample_blocks",
    "sample_tokens",
]

_HOMES = {
    "ACDiTClassifier": "acdit.classifiers",
    "ACDiTPipeline": "acdit.pipelines",
    "ACDiTTextPipeline": "acdit.pipelines_text",
    "ACDiTTransformer": "acdit.model",
    "BlockLayout": "acdit.layout",
    "KVCache": "acdit.cache",
    "sample_blocks": "acdit.sampling",
    "sample_tokens": "acdit.text_sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'acdit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
