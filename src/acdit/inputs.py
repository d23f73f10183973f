"""What the transformer takes: shapes of blocks, of timesteps and labels, numbers of layers, settings of text.

Shapes: B batch, C noisy copies, N blocks, L tokens a block, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acdit.errors import ConfigError
from acdit.layout import BlockLayout


def require_blocks(name: str, x: Tensor, tail: Sequence[int], copies: bool, ids: bool) -> None:
    """Refuse blocks of another shape.

    Args:
        name: of the argument.
        x: (B, *tail), or with copies (B, C, *tail).
        tail: (N, L, D), or (N, L) of token ids.
        copies: whether C is there.
        ids: whether they are token ids.

    Raises:
        ConfigError: another shape, or ids that are no integers.
    """
    if x.ndim != 1 + copies + len(tail) or tuple(x.shape[-len(tail) :]) != tuple(tail):
        raise ConfigError(
            name,
            found=f"shape {tuple(x.shape)}",
            expected=f"(B, {', '.join(map(str, tail))})" + (", or (B, C, …) for C noisy copies" * (name == "noisy")),
            fix="cut the data with model.layout.to_blocks",
        )
    if ids and x.dtype not in (torch.int64, torch.int32):
        raise ConfigError(name, found=str(x.dtype), expected="token ids, torch.int64")


def spread(value: Tensor, shape: tuple[int, ...], keep_copies: bool) -> Tensor:
    """A timestep or label per sample, per block or per copy and block, with size-1 axes where it does not vary.

    Args:
        value: a number, (B,), or one a block: broadcastable to `shape`.
        shape: (B,), (B, N) or (B, C, N).
        keep_copies: whether values may differ between copies.

    Raises:
        ConfigError: another shape.
    """
    if value.ndim == 0:
        return value.reshape((1,) * len(shape))
    if value.ndim == 1 and value.shape[0] in (1, shape[0]):
        return value.reshape(-1, *(1,) * (len(shape) - 1))
    wide = value[:, None] if value.ndim == 2 and len(shape) == 3 else value
    known = wide.ndim == len(shape) and (keep_copies or value.ndim != 3)
    if known and all(size in (1, full) for size, full in zip(wide.shape, shape, strict=True)):
        return wide
    raise ConfigError("timestep or class_labels", found=f"shape {tuple(value.shape)}", expected=f"up to {shape}")


def layer_indices(layers: Sequence[int] | None, count: int) -> list[int]:
    """Layers as indices from the beginning; None: the last one.

    Raises:
        ConfigError: none, or one that is not there.
    """
    given = [count - 1] if layers is None else list(layers)
    if not given or not all(-count <= index < count for index in given):
        raise ConfigError("layers", found=str(given), expected=f"at least one of {-count} … {count - 1}")
    return [index % count for index in given]


def require_text(layout: BlockLayout, vocab_size: int, in_channels: int, usual_channels: int) -> None:
    """Refuse settings that do not go with token ids.

    Raises:
        ConfigError: no vocabulary, patches, or channels that were given.
    """
    if vocab_size < 1:
        raise ConfigError("vocab_size", found=str(vocab_size), expected="at least 1")
    if any(size != 1 for size in layout.patch):
        raise ConfigError("patch", found=str(layout.patch), expected="1: a token of text is one cell")
    if in_channels != usual_channels:
        raise ConfigError("in_channels", found=str(in_channels), expected="nothing beside vocab_size: ids have none")
