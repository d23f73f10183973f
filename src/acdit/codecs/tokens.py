"""Token ids: text that was tokenized beforehand is in model space already."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenIdsCodec:
    """What training does with a batch of token ids (B, S): nothing but make them int64."""

    @staticmethod
    def noise_shape(data_shape: tuple[int, ...]) -> None:
        """`encode` wants no noise."""

    @staticmethod
    def encode(stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, S) of any integer type → int64."""
        return stored.to(torch.int64)
