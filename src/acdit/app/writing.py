"""Texts of one request: the library's loop over tokens, its steps told as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from acdit.app.events import Cancelled, Done, Text, Ticket
from acdit.app.models import ServedModel
from acdit.app.requests import TextRequest
from acdit.cache import KVCache
from acdit.codecs import Tokenizer
from acdit.errors import ConfigError
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.text_sampling import TextSamplingStep, cut_text, make_sampler, sample_tokens

MASKED = "▒"
PREVIEW_SECONDS = 0.08


class Stopped(Exception):
    """The request was cancelled."""


def prompt_ids(served: ServedModel, request: TextRequest) -> list[int]:
    """The prompt's tokens, checked against the context.

    Raises:
        ConfigError: too long, or more new tokens than there is room for.
    """
    (ids,) = served.pipeline.prompt_ids([request.prompt])
    context = served.layout.num_tokens
    if len(ids) >= context:
        raise ConfigError("prompt", found=f"{len(ids)} tokens", expected=f"fewer than the context's {context}")
    room = context - len(ids)
    if request.new_tokens is not None and request.new_tokens > room:
        raise ConfigError(
            "new_tokens", found=f"{request.new_tokens} behind a prompt of {len(ids)}", expected=f"at most {room}"
        )
    return ids


def write(served: ServedModel, ticket: Ticket, register: Callable[[KVCache], None]) -> None:
    """Write the texts of a ticket's checked `TextRequest`.

    Args:
        served: the model.
        ticket: hears `Text` events and `Done`.
        register: told of the cache.

    Raises:
        Stopped: it was cancelled, and has been told.
    """
    request = ticket.request
    assert isinstance(request, TextRequest)
    assert isinstance(served.pipeline, ACDiTTextPipeline)
    model, tokenizer = served.pipeline.transformer, served.pipeline.tokenizer
    ids = prompt_ids(served, request)
    length = model.layout.block_tokens
    new = request.new_tokens or model.layout.num_tokens - len(ids)
    end, first = len(ids) + new, len(ids) // length
    total = (math.ceil(end / length) - first) * length
    eos = getattr(tokenizer, "eos_token_id", None)
    cache = model.new_cache(request.samples, max(1, math.ceil(end / length) - 1))
    register(cache)
    rows = [list(ids[: first * length]) for _ in range(request.samples)]
    started = shown = time.monotonic()

    def texts() -> tuple[str, ...]:
        return tuple(tokenizer.decode(cut_text(row, len(ids), new, eos)) for row in rows)

    def tell(block: int, current: list[list[int]], finished: bool, step: int) -> None:
        masked = sum(row.count(model.mask_token or -1) for row in current) / max(1, len(current))
        done = (block - first) * length + round(length - masked)
        spent = time.monotonic() - started
        ticket.put(
            Text(
                texts=texts(), current=tuple(_with_masks(tokenizer, row, model.mask_token) for row in current),
                block=block, finished=finished, step=step, done=min(done, total), total=total,
                seconds_left=spent / done * (total - done) if done else None,
            )
        )  # fmt: skip

    def on_step(state: TextSamplingStep) -> None:
        nonlocal shown
        why = ticket.cancelled
        if why is not None:
            ticket.put(Cancelled(why))
            raise Stopped
        if state.step == 0 or time.monotonic() - shown >= PREVIEW_SECONDS:
            shown = time.monotonic()
            tell(state.block, state.tokens.tolist(), False, state.step + 1)

    blocks = sample_tokens(
        model, prompts=[ids], batch_size=request.samples,
        sampler=make_sampler(request.sampler, request.steps, request.threshold), temperature=request.temperature,
        top_p=request.top_p, max_new_tokens=request.new_tokens, eos_token=eos, cache=cache, generator=request.seed,
        on_step=on_step,
    )  # fmt: skip
    for block, tokens in enumerate(blocks, start=first):
        for row, written in zip(rows, tokens.tolist(), strict=True):
            row += written
        tell(block, [], True, 0)
    ticket.put(
        Done(
            frames=None, texts=texts(), labels=(), settings=request.settings(), seconds=time.monotonic() - started,
            batch=request.samples,
        )
    )  # fmt: skip


def _with_masks(tokenizer: Tokenizer, row: list[int], mask: int | None) -> str:
    """A block at work as text: runs of known tokens decoded, a sign for each masked one."""
    parts: list[str] = []
    known: list[int] = []
    for token in [*row, None]:
        if token is None or token == mask:
            parts.append(tokenizer.decode(known) if known else "")
            parts.append(MASKED if token is not None else "")
            known = []
        else:
            known.append(token)
    return "".join(parts)
