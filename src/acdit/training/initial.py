"""A run that starts from a model's weights: fine-tuning, or a video model from a model of images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from acdit.codecs import load_tokenizer, require_vocabulary
from acdit.errors import ConfigError, first_line
from acdit.model import ACDiTTransformer

logger = logging.getLogger(__name__)


def initialise(model: ACDiTTransformer, source: str, tokenizer: Any = None) -> list[str]:
    """Copy the weights of a saved model; what has another shape keeps its fresh values.

    RoPE has no weights and blocks none either: an image model fits a video model of its width and depth. The label
    embedding of other classes, and the two linears of tokens of another size, do not; they start afresh.

    Args:
        model: to be changed.
        source: folder of a pipeline (a run's model/) or of its transformer, a built-in model's name, or a hub id.
        tokenizer: of the run's text. With as many tokens as the source's it must be the same; of another number, the
            embedding and the output start afresh.

    Returns:
        Names of the parameters that were not taken.

    Raises:
        ConfigError: no such model, layers of another size, ids that mean other tokens.
    """
    folder = Path(source)
    subfolder = None if (folder / "config.json").is_file() else "transformer"
    try:
        other = ACDiTTransformer.from_pretrained(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "train.init_from", found=f"{source}: {first_line(error)}", expected="a saved ACDiT model",
            fix="the model/ folder of a run",
        ) from None  # fmt: skip
    ours, theirs = model.state_dict(), other.state_dict()
    fresh = [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if any(name.startswith("layers.") for name in fresh) or len(other.layers) != len(model.layers):
        sizes = [_size(one) for one in (other, model)]
        raise ConfigError(
            "train.init_from", found=f"{source}, {sizes[0]}", expected=f"layers of this recipe's model, {sizes[1]}",
            fix="change the recipe's model, or leave train.init_from out",
        )  # fmt: skip
    with torch.no_grad():
        for name, value in ours.items():
            if name not in fresh:
                value.copy_(theirs[name])
    saved = folder / "tokenizer"
    if tokenizer is not None and saved.is_dir() and other.mask_token == model.mask_token:
        require_vocabulary(tokenizer, tokenizer.vocab_size, load_tokenizer(str(saved)))
    if fresh:
        logger.warning("not taken from %s, because their shapes differ: %s", source, ", ".join(fresh))
    return fresh


def _size(model: ACDiTTransformer) -> str:
    config = model.config
    return f"{config.num_layers} layers of {config.num_attention_heads} heads × {config.attention_head_dim}"
