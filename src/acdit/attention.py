"""Skip-causal attention (paper section 4.2, Figure 2): one rule, three exact executions.

The rule is `may_attend`: a query sees the clean blocks before its own block, and its own block in its own stream.
Everything the paper's mask says follows: a clean block reads clean blocks up to itself, a noisy block reads the clean
blocks before it and itself, nothing reads another noisy block, and nothing clean reads anything noisy.

Executions, all the same function of (q, k, v):

- ``"dense"``: a boolean mask. The definition, S² memory; for tests.
- ``"sdpa"``: no mask tensor. What a query sees is a contiguous prefix of clean keys plus its own block, so attention
  runs on these dense rectangles only, and autograd keeps O(S).
- ``"flex"``: FlexAttention with a cached BlockMask, for CUDA.

Blocks are laid out as one axis of M = N_clean + C·N blocks: the clean ones first, then C noisy copies of N blocks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from acdit import products
from acdit.errors import ConfigError

logger = logging.getLogger(__name__)

EXECUTIONS = ("auto", "sdpa", "flex", "dense")
CLEAN = -1
"""Stream number of the clean stream; noisy copies count from 0."""


def may_attend(query_stream: Any, query_block: Any, key_stream: Any, key_block: Any) -> Any:
    """The skip-causal rule, elementwise on integers or integer tensors (paper section 4.2).

    Args:
        query_stream, key_stream: `CLEAN` or the index of a noisy copy.
        query_block, key_block: index of the autoregressive block.

    Returns:
        Whether the query may attend the key.
    """
    earlier_clean_block = (key_stream == CLEAN) & (key_block < query_block)
    own_block = (key_stream == query_stream) & (key_block == query_block)
    return earlier_clean_block | own_block


@dataclass(frozen=True)
class Streams:
    """Which blocks stand on the block axis: `num_clean` clean ones, then `copies` noisy copies of `num_blocks`."""

    num_clean: int
    num_blocks: int
    copies: int
    block_tokens: int

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

    def prefix_readers(self, first_query: int) -> Iterator[tuple[int, list[int]]]:
        """Autoregressive blocks that read a clean prefix, each with its query rows in all streams.

        Rows are counted from `first_query` on the block axis; the prefix of block i is clean blocks 0 … i−1.
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
    return may_attend(stream[start:, None], block[start:, None], stream, block)


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
        )

    queries = (streams.total - first_query) * length
    return create_block_mask(mask_mod, None, None, queries, streams.total * length, device=device)


@functools.lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    logger.info(message)


def choose_execution(requested: str, device: torch.device, requires_grad: bool) -> str:
    """The execution that runs: the requested one, or for "auto" FlexAttention on CUDA and SDPA elsewhere.

    Raises:
        ConfigError: an unknown name.
    """
    if requested not in EXECUTIONS:
        raise ConfigError("attention execution", found=repr(requested), expected=f"one of {EXECUTIONS}")
    if requested == "auto":
        choice = "flex" if device.type == "cuda" else "sdpa"
        reason = f"chosen for {device.type}"
    elif requested == "flex" and device.type != "cuda" and requires_grad:
        choice, reason = "sdpa", f"FlexAttention has no backward on {device.type}"
    else:
        choice, reason = requested, "as requested"
    if not torch.compiler.is_compiling():
        _log_once(f"skip-causal attention runs as {choice!r}: {reason}")
    return choice


def skip_causal_attention(q: Tensor, k: Tensor, v: Tensor, streams: Streams, execution: str = "auto") -> Tensor:
    """Attention of all blocks of a training forward under the skip-causal rule.

    Args:
        q: (B, M_q, L, H, K). M_q is M, or fewer when the first M − M_q blocks ask nothing (the last layer's clean
            blocks, whose outputs nobody reads).
        k, v: (B, M, L, H, K).
        streams: what stands on the block axis.
        execution: "auto", "sdpa", "flex" or "dense".

    Returns:
        (B, M_q, L, H, K), contiguous.
    """
    first_query = streams.total - q.shape[1]
    requires_grad = q.requires_grad or k.requires_grad or v.requires_grad
    chosen = choose_execution(execution, q.device, requires_grad)
    if chosen == "sdpa" or streams.num_clean == 0:
        if q.device.type == "cpu":
            return _blockwise_attention(q, k, v, streams.num_clean, streams.num_blocks, streams.copies)[0]
        return _blockwise_rebuilt(q, k, v, streams)
    queries, keys, values = (part.flatten(1, 2).transpose(1, 2) for part in (q, k, v))
    if chosen == "flex":
        run = _compiled_flex_attention() if q.device.type == "cuda" else flex_attention
        out = run(queries, keys, values, block_mask=flex_mask(streams, first_query, q.device))
    else:
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=dense_mask(streams, first_query, q.device)
        )
    return out.transpose(1, 2).reshape(q.shape)


@functools.lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


# --- sdpa: per-block rectangles, no mask -------------------------------------------------------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Unmasked attention on (B, T, H, K) tensors with its log-sum-exp: out like q, lse (B, T, H, 1)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False
    )
    return out.transpose(1, 2), lse.transpose(1, 2).unsqueeze(-1)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dtype == torch.bfloat16 and not products.CPU_MULTIPLIES_BF16:
        # torch's bf16 kernel is ten times slower there; factors widen exactly, the softmax is kept in fp32.
        grad, q, k, v, out = (part.float() for part in (grad, q, k, v, out))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(part.transpose(1, 2) for part in (grad, q, k, v, out)), lse.squeeze(-1).transpose(1, 2), 0.0, False
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the two partial results."""
    total = torch.logaddexp(lse, more_lse)
    # Weights are in the log-sum-exp's dtype (fp32 or wider), so bf16 partial results are merged in fp32.
    merged = out * (lse - total).exp() + more * (more_lse - total).exp()
    return merged, total


# The two functions below are registered as operators so that torch.compile sees one node instead of N unrolled calls.


@torch.library.custom_op("acdit::blockwise_attention", mutates_args=(), device_types="cpu")
def _blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, num_clean: int, num_blocks: int, copies: int
) -> tuple[Tensor, Tensor]:
    """The sdpa execution on CPU: own blocks in one call, clean prefixes one call a block, merged by log-sum-exp.

    Returns:
        The output like q, and the log-sum-exp (B, M_q, L, H, 1).
    """
    streams = Streams(num_clean, num_blocks, copies, q.shape[2])
    first_query = streams.total - q.shape[1]
    own_out, own_lse = _flash(q.flatten(0, 1), k[:, first_query:].flatten(0, 1), v[:, first_query:].flatten(0, 1))
    out, lse = own_out.reshape(q.shape).contiguous(), own_lse.unflatten(0, q.shape[:2]).contiguous()
    for block, rows in streams.prefix_readers(first_query):
        prefix_out, prefix_lse = _flash(
            _gather(q, rows).flatten(1, 2), k[:, :block].flatten(1, 2), v[:, :block].flatten(1, 2)
        )
        shape = (len(rows), streams.block_tokens)
        merged, total = _merge(
            _gather(out, rows), _gather(lse, rows), prefix_out.unflatten(1, shape), prefix_lse.unflatten(1, shape)
        )
        for place, row in enumerate(rows):
            out[:, row] = merged[:, place]
            lse[:, row] = total[:, place]
    return out, lse


@torch.library.custom_op("acdit::blockwise_attention_backward", mutates_args=(), device_types="cpu")
def _blockwise_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_clean: int,
    num_blocks: int,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    The backward of a partial attention is exact when it is given the *merged* output and log-sum-exp (softmax weights
    are exp(qk − lse) whatever subset of the keys is at hand), so nothing but q, k, v, the output and lse is kept: O(S).
    """
    streams = Streams(num_clean, num_blocks, copies, q.shape[2])
    first_query = streams.total - q.shape[1]
    # Sums over many readers are kept in fp32 or wider.
    wide = torch.promote_types(q.dtype, torch.float32)
    own = _flash_backward(*(part.flatten(0, 1) for part in (grad, q, k[:, first_query:], v[:, first_query:], out, lse)))
    grad_q, grad_k, grad_v = (part.unflatten(0, q.shape[:2]).to(wide) for part in own)
    del own  # in a training step this is where memory peaks
    if first_query:
        unread = k.new_zeros((k.shape[0], first_query, *k.shape[2:]), dtype=wide)
        grad_k, grad_v = torch.cat([unread, grad_k], dim=1), torch.cat([unread, grad_v], dim=1)
    for block, rows in streams.prefix_readers(first_query):
        part_grad, part_q, part_out, part_lse = (_gather(part, rows).flatten(1, 2) for part in (grad, q, out, lse))
        step_q, step_k, step_v = _flash_backward(
            part_grad, part_q, k[:, :block].flatten(1, 2), v[:, :block].flatten(1, 2), part_out, part_lse
        )
        step_q = step_q.unflatten(1, (len(rows), streams.block_tokens))
        for place, row in enumerate(rows):
            grad_q[:, row] += step_q[:, place]
        grad_k[:, :block] += step_k.unflatten(1, (block, streams.block_tokens))
        grad_v[:, :block] += step_v.unflatten(1, (block, streams.block_tokens))
        del step_q, step_k, step_v  # or they would live on while the next block's are made
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@_blockwise_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_clean: int, num_blocks: int, copies: int) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-1], 1), dtype=lse_dtype)


@_blockwise_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_clean: int,
    num_blocks: int,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.streams = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _blockwise_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.streams)
    return (*grads, None, None, None)


_blockwise_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _gather(x: Tensor, rows: list[int]) -> Tensor:
    """Blocks `rows` of the block axis; a view when it is one row."""
    return x[:, rows[0] : rows[0] + 1] if len(rows) == 1 else torch.stack([x[:, row] for row in rows], dim=1)


def _blockwise_rebuilt(q: Tensor, k: Tensor, v: Tensor, streams: Streams) -> Tensor:
    """The sdpa execution on any device: keys of prefix and own block are joined per block and, when gradients are
    needed, joined again in the backward instead of being kept."""
    first_query = streams.total - q.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, row: int, block: int) -> Tensor:
        own = row + first_query
        keys, values = k[:, own], v[:, own]
        if block and streams.num_clean:
            keys = torch.cat([k[:, :block].flatten(1, 2), keys], dim=1)
            values = torch.cat([v[:, :block].flatten(1, 2), values], dim=1)
        return F.scaled_dot_product_attention(
            q[:, row].transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        ).transpose(1, 2)

    outs = []
    blocks = streams.block_of(torch.arange(first_query, streams.total)).tolist()
    for row, block in enumerate(blocks):
        if torch.is_grad_enabled():
            outs.append(checkpoint(attend, q, k, v, row, block, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(attend(q, k, v, row, block))
    return torch.stack(outs, dim=1)


# --- sampling: queries against a cached prefix -------------------------------------------------------------------


def attend_prefix_and_own(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """A noisy block of every guidance branch against one shared clean prefix and itself (paper section 4.2).

    Args:
        q, k, v: (G·B, L, H, K), branch-major: all samples of branch 0, then of branch 1, …
        prefix_k, prefix_v: (B, P, H, K) clean keys and values, P ≥ 0. They are shared by the G branches, not copied.

    Returns:
        (G·B, L, H, K).
    """
    samples, branches = prefix_k.shape[0], q.shape[0] // prefix_k.shape[0]
    if prefix_k.shape[1] == 0:
        return _plain(q, k, v)
    if q.device.type != "cpu" or torch.is_grad_enabled():
        keys = torch.cat([prefix_k.repeat(branches, 1, 1, 1), k], dim=1)
        values = torch.cat([prefix_v.repeat(branches, 1, 1, 1), v], dim=1)
        return _plain(q, keys, values)
    own_out, own_lse = _flash(q, k, v)
    # The branches of a sample ask the same keys: fold them into one longer query.
    folded = q.unflatten(0, (branches, samples)).transpose(0, 1).flatten(1, 2)
    prefix_out, prefix_lse = (
        part.unflatten(1, (branches, -1)).transpose(0, 1).flatten(0, 1) for part in _flash(folded, prefix_k, prefix_v)
    )
    return _merge(own_out, own_lse, prefix_out, prefix_lse)[0].to(q.dtype)


def attend_clean_blocks(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """New clean blocks against all clean blocks up to themselves (paper section 4.2).

    Args:
        q: (B, n, L, H, K), queries of the last n blocks of the prefix.
        keys, values: (B, P + n·L, H, K), the prefix with these blocks at its end.

    Returns:
        (B, n, L, H, K).
    """
    count, length = q.shape[1], q.shape[2]
    before = keys.shape[1] - count * length
    outs = []
    for block in range(count):
        end = before + (block + 1) * length
        outs.append(_plain(q[:, block], keys[:, :end], values[:, :end]))
    return torch.stack(outs, dim=1)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
