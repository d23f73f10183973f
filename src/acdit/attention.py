"""Skip-causal attention (paper section 4.2, Figure 2): one rule (`acdit.mask`), three exact executions.

Executions, all the same function of (q, k, v):

- ``"dense"``: a boolean mask. The definition, S² memory; for tests.
- ``"sdpa"``: no mask tensor. What a query sees is a contiguous range of clean keys (two of them where a window has
  sinks) plus its own block, so attention runs on these dense rectangles only, and autograd keeps O(S).
- ``"flex"``: FlexAttention with a cached BlockMask, for CUDA.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from acdit import products
from acdit.errors import ConfigError
from acdit.mask import Streams, Window, dense_mask, flex_mask
from acdit.rope import rotate

logger = logging.getLogger(__name__)

EXECUTIONS = ("auto", "sdpa", "flex", "dense")


@functools.lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    logger.info(message)


_TINY_BLOCK, _SHORT = 4, 1024
"""Tokens a block, and of a sequence, up to which a mask over everything is faster on a CPU than a call for each block:
1.05 to 2.4 times (a training step of two layers of width 128, two cores with AVX-512)."""


def choose_execution(requested: str, device: torch.device, requires_grad: bool, streams: Streams | None = None) -> str:
    """The execution that runs: the requested one, or for "auto" FlexAttention on CUDA and SDPA elsewhere, but a dense
    mask where `streams` are many tiny blocks of a short sequence.

    Raises:
        ConfigError: an unknown name.
    """
    if requested not in EXECUTIONS:
        raise ConfigError("attention execution", found=repr(requested), expected=f"one of {EXECUTIONS}")
    if requested == "auto":
        length, blocks = (0, 0) if streams is None else (streams.block_tokens, streams.num_blocks)
        tiny = 0 < length <= _TINY_BLOCK and length * blocks <= _SHORT
        choice = "flex" if device.type == "cuda" else "dense" if device.type == "cpu" and tiny else "sdpa"
        reason = f"chosen for {device.type}" + " and tiny blocks" * (choice == "dense")
    elif requested == "flex" and device.type != "cuda" and requires_grad:
        choice, reason = "sdpa", f"FlexAttention has no backward on {device.type}"
    else:
        choice, reason = requested, "as requested"
    if not torch.compiler.is_compiling():
        _log_once(f"skip-causal attention runs as {choice!r}: {reason}")
    return choice


def skip_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, streams: Streams, execution: str = "auto", sinks: SinkRotation | None = None
) -> Tensor:
    """Attention of all blocks of a training forward under the skip-causal rule.

    Args:
        q: (B, M_q, L, H, K). M_q is M, or fewer when the first M − M_q blocks ask nothing (the last layer's clean
            blocks, whose outputs nobody reads).
        k, v: (B, M, L, H, K).
        streams: what stands on the block axis.
        execution: "auto", "sdpa", "flex" or "dense".
        sinks: the sinks' keys turn along with the window; None: they keep their true positions. A sink's key then
            differs from query to query, which no mask can say: the per-block path runs, whatever was asked for.

    Returns:
        (B, M_q, L, H, K), contiguous.
    """
    first_query = streams.total - q.shape[1]
    if sinks is not None:
        choose_execution(execution, q.device, False)
        return _blockwise_rebuilt(q, k, v, streams, sinks)
    requires_grad = q.requires_grad or k.requires_grad or v.requires_grad
    chosen = choose_execution(execution, q.device, requires_grad, streams)
    if chosen == "sdpa" or streams.num_clean == 0:
        if q.device.type == "cpu":
            window = (0, 0) if streams.window is None else (streams.window.blocks, streams.window.sinks)
            return _blockwise_attention(q, k, v, streams.num_clean, streams.num_blocks, streams.copies, *window)[0]
        return _blockwise_rebuilt(q, k, v, streams, None)
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
    q: Tensor, k: Tensor, v: Tensor, num_clean: int, num_blocks: int, copies: int, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """The sdpa execution on CPU: own blocks in one call, clean ranges one call a block, merged by log-sum-exp.

    Args:
        window: W; 0: no window.

    Returns:
        The output like q, and the log-sum-exp (B, M_q, L, H, 1).
    """
    streams = _streams(num_clean, num_blocks, copies, q.shape[2], window, sinks)
    first_query = streams.total - q.shape[1]
    own_out, own_lse = _flash(q.flatten(0, 1), k[:, first_query:].flatten(0, 1), v[:, first_query:].flatten(0, 1))
    out, lse = own_out.reshape(q.shape).contiguous(), own_lse.unflatten(0, q.shape[:2]).contiguous()
    for block, rows in streams.prefix_readers(first_query):
        queries, merged, total = _gather(q, rows).flatten(1, 2), _gather(out, rows), _gather(lse, rows)
        shape = (len(rows), streams.block_tokens)
        for start, stop in streams.segments(block):
            part_out, part_lse = _flash(queries, k[:, start:stop].flatten(1, 2), v[:, start:stop].flatten(1, 2))
            merged, total = _merge(merged, total, part_out.unflatten(1, shape), part_lse.unflatten(1, shape))
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
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    The backward of a partial attention is exact when it is given the *merged* output and log-sum-exp (softmax weights
    are exp(qk − lse) whatever subset of the keys is at hand), so nothing but q, k, v, the output and lse is kept: O(S).
    """
    streams = _streams(num_clean, num_blocks, copies, q.shape[2], window, sinks)
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
        for start, stop in streams.segments(block):
            step_q, step_k, step_v = _flash_backward(
                part_grad, part_q, k[:, start:stop].flatten(1, 2), v[:, start:stop].flatten(1, 2), part_out, part_lse
            )
            step_q = step_q.unflatten(1, (len(rows), streams.block_tokens))
            for place, row in enumerate(rows):
                grad_q[:, row] += step_q[:, place]
            grad_k[:, start:stop] += step_k.unflatten(1, (stop - start, streams.block_tokens))
            grad_v[:, start:stop] += step_v.unflatten(1, (stop - start, streams.block_tokens))
            del step_q, step_k, step_v  # or they would live on while the next block's are made
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@_blockwise_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, num_clean: int, num_blocks: int, copies: int, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
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
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.streams = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _blockwise_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.streams)
    return (*grads, *(None,) * len(ctx.streams))


_blockwise_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _gather(x: Tensor, rows: list[int]) -> Tensor:
    """Blocks `rows` of the block axis; a view when it is one row."""
    return x[:, rows[0] : rows[0] + 1] if len(rows) == 1 else torch.stack([x[:, row] for row in rows], dim=1)


def _streams(num_clean: int, num_blocks: int, copies: int, block_tokens: int, window: int, sinks: int) -> Streams:
    """`Streams` from the plain numbers that an operator may be given."""
    return Streams(num_clean, num_blocks, copies, block_tokens, Window(window, sinks) if window else None)


@dataclass(frozen=True)
class SinkRotation:
    """How far a query block sees the sinks turned: they stay right before its window instead of where they were.

    Args:
        cos, sin: (N, 1, 1, K), a rotation for each autoregressive block of queries.
        form: of the rotation, see `acdit.rope`; one that composes ("axial", "1d").
    """

    cos: Tensor
    sin: Tensor
    form: str

    def turn(self, keys: Tensor, block: int) -> Tensor:
        """Rotated keys (…, H, K) as a query in `block` sees them."""
        return rotate(keys, self.cos[block], self.sin[block], self.form).to(keys.dtype)


def _blockwise_rebuilt(q: Tensor, k: Tensor, v: Tensor, streams: Streams, sinks: SinkRotation | None) -> Tensor:
    """The sdpa execution on any device: keys of clean ranges and own block are joined per block and, when gradients
    are needed, joined again in the backward instead of being kept."""
    first_query = streams.total - q.shape[1]
    moved = 0 if sinks is None or streams.window is None else streams.window.sinks

    def attend(q: Tensor, k: Tensor, v: Tensor, row: int, block: int) -> Tensor:
        own = row + first_query
        keys, values = [k[:, own]], [v[:, own]]
        for start, stop in streams.segments(block) if streams.num_clean else ():
            turned = min(max(moved, start), stop)  # the clean blocks start … turned − 1 are sinks
            if sinks is not None and turned > start:
                keys.append(sinks.turn(k[:, start:turned], block).flatten(1, 2))
            else:
                turned = start
            keys.append(k[:, turned:stop].flatten(1, 2))
            values.append(v[:, start:stop].flatten(1, 2))
        return F.scaled_dot_product_attention(
            q[:, row].transpose(1, 2), torch.cat(keys, dim=1).transpose(1, 2), torch.cat(values, dim=1).transpose(1, 2)
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


def attend_all_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every block against every block, (B, n, L, H, K) each: no order is left."""
    return _plain(*(part.flatten(1, 2) for part in (q, k, v))).unflatten(1, q.shape[1:3])


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
