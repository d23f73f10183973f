"""Who may attend whom (paper section 4.2, Figure 2): the skip-causal rule, once, and what follows from it.

The rule is `may_attend`: a query sees the clean blocks before its own block, and its own block in its own stream.
Everything the paper's mask says follows: a clean block reads clean blocks up to itself, a noisy block reads the clean
blocks before it and itself, nothing reads another noisy block, and nothing clean reads anything noisy.

A `Window` forgets: of the clean blocks before, only the last few are seen, and the very first ones if asked for. It is
what lets a stream run for ever in constant memory, and training under it is what makes that exact.

Blocks are laid out as one axis of M = N_clean + C·N blocks: the clean ones first, then C noisy copies of N blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from acdit.errors import ConfigError

CLEAN = -1
"""Stream number of the clean stream; noisy copies count from 0."""


@dataclass(frozen=True)
class Window:
    """How much of the past is seen.

    Args:
        blocks: W, clean blocks right before a query's own.
        sinks: clean blocks at the very beginning that stay in sight.
        slide: sinks are seen right before the window, along the first axis, instead of at their true positions. Who is
            seen does not change.

    Raises:
        ConfigError: no block at all, or a negative number.
    """

    blocks: int
    sinks: int = 0
    slide: bool = False

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.sinks < 0:
            raise ConfigError(
                "window, sink_blocks", found=f"{self.blocks}, {self.sinks}", expected="at least 1 and at least 0"
            )

    def start(self, block: int) -> int:
        """First block of the window of a query in `block`."""
        return max(0, block - self.blocks)

    @property
    def capacity(self) -> int:
        """Clean blocks that are ever seen at once."""
        return self.blocks + self.sinks

    def lag(self, block: int) -> int:
        """Blocks that lie forgotten between the sinks and the window of a query in `block`."""
        return max(0, self.start(block) - self.sinks) if self.sinks else 0

    def segments(self, block: int) -> list[tuple[int, int]]:
        """Clean blocks that a query in `block` sees besides its own: one or two ranges [start, stop)."""
        start = self.start(block)
        if start <= self.sinks:
            return [(0, block)] if block else []
        return ([(0, self.sinks)] if self.sinks else []) + [(start, block)]


SINK_POSITIONS = ("true", "sliding")


def make_window(blocks: int | None, sinks: int, positions: str, can_turn: bool) -> Window | None:
    """The window that a model's settings name; None: none.

    Args:
        blocks: W; None: no window.
        sinks: how many blocks at the beginning stay in sight.
        positions: one of `SINK_POSITIONS`.
        can_turn: whether the model's RoPE is a rotation, so that keys can be moved.

    Raises:
        ConfigError: sinks without a window, an unknown word, sinks that cannot slide.
    """
    if positions not in SINK_POSITIONS:
        raise ConfigError("sink_positions", found=repr(positions), expected=f"one of {SINK_POSITIONS}")
    if blocks is None:
        if sinks or positions != "true":
            raise ConfigError(
                "sink_blocks, sink_positions", found=f"{sinks}, {positions!r} without a window",
                expected="0 and 'true': without a window every block stays in sight", fix="set window",
            )  # fmt: skip
        return None
    if positions == "sliding" and not (sinks and can_turn):
        found = "'sliding' without sinks" if not sinks else "'sliding' with rope 'reference', which is no rotation"
        expected = "sink_blocks above 0" if not sinks else "'true', or another rope"
        raise ConfigError("sink_positions", found=found, expected=expected)
    return Window(blocks, sinks, positions == "sliding")


def may_attend(
    query_stream: Any, query_block: Any, key_stream: Any, key_block: Any, window: Window | None = None
) -> Any:
    """The skip-causal rule, elementwise on integers or integer tensors (paper section 4.2).

    Args:
        query_stream, key_stream: `CLEAN` or the index of a noisy copy.
        query_block, key_block: index of the autoregressive block.
        window: what is seen of the past; None: all of it.

    Returns:
        Whether the query may attend the key.
    """
    earlier_clean_block = (key_stream == CLEAN) & (key_block < query_block)
    if window is not None:
        earlier_clean_block &= (key_block >= query_block - window.blocks) | (key_block < window.sinks)
    own_block = (key_stream == query_stream) & (key_block == query_block)
    return earlier_clean_block | own_block


@dataclass(frozen=True)
class Streams:
    """Which blocks stand on the block axis: `num_clean` clean ones, then `copies` noisy copies of `num_blocks`."""

    num_clean: int
    num_blocks: int
    copies: int
    block_tokens: int
    window: Window | None = None

    @property
    def num_noisy(self) -> int:
        return self.copies * self.num_blocks

    @property
    def total(self) -> int:
        return self.num_clean + self.num_noisy

    def stream_of(self, index: Tensor) -> Tensor:
        """Stream of the block at `index` of the block axis."""
        noisy = index - self.num_clean
        return torch.where(noisy < 0, CLEAN, torch.div(noisy, self.num_blocks, rounding_mode="floor"))

    def block_of(self, index: Tensor) -> Tensor:
        """Autoregressive index of the block at `index` of the block axis."""
        noisy = index - self.num_clean
        return torch.where(noisy < 0, index, noisy % self.num_blocks)

    def segments(self, block: int) -> list[tuple[int, int]]:
        """Ranges of clean blocks that block `block` of any stream sees besides its own."""
        if self.window is not None:
            return self.window.segments(block)
        return [(0, block)] if block else []

    def prefix_readers(self, first_query: int) -> Iterator[tuple[int, list[int]]]:
        """Autoregressive blocks that read clean blocks, each with its query rows in all streams.

        Rows are counted from `first_query` on the block axis; what block i reads are `segments(i)`.
        """
        for block in range(1, self.num_blocks if self.num_clean else 1):
            rows = [self.num_clean + copy * self.num_blocks + block for copy in range(self.copies)]
            if block < self.num_clean:
                rows.insert(0, block)
            rows = [row - first_query for row in rows if row >= first_query]
            if rows:
                yield block, rows


def dense_mask(streams: Streams, first_query: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The mask as booleans, (queries, keys) in tokens; queries start at block `first_query` of the block axis."""
    token = torch.arange(streams.total * streams.block_tokens, device=device) // streams.block_tokens
    stream, block = streams.stream_of(token), streams.block_of(token)
    start = first_query * streams.block_tokens
    return may_attend(stream[start:, None], block[start:, None], stream, block, streams.window)


@functools.lru_cache(maxsize=32)
def flex_mask(streams: Streams, first_query: int, device: torch.device) -> BlockMask:
    """FlexAttention's BlockMask of the same rule; made once for each (streams, first query, device)."""
    length = streams.block_tokens

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_index, key_index = query // length + first_query, key // length
        return may_attend(
            streams.stream_of(query_index),
            streams.block_of(query_index),
            streams.stream_of(key_index),
            streams.block_of(key_index),
            streams.window,
        )

    queries = (streams.total - first_query) * length
    return create_block_mask(mask_mod, None, None, queries, streams.total * length, device=device)
