"""Perplexity of text: the bound on the negative log-likelihood, averaged over draws of masks.

Two estimators (see `MaskingCorruption`): "rate", the protocol of MDLM and BD3-LMs (t on [1e-3, 1]), and "count", exact.
Always over the whole range of t, whatever range was trained on. With one token a block it is no bound but the exact
autoregressive likelihood, and one draw says all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acdit import draws
from acdit.codecs import Tokenizer
from acdit.corruption import MaskingCorruption
from acdit.corruption.masking import LOWEST_RATE
from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.evaluation.intervals import NORMAL_95
from acdit.model import ACDiTTransformer
from acdit.processes import Processes


@dataclass(frozen=True)
class TextBound:
    """What a split costs a model, in nats a token."""

    nats_per_token: float
    interval: tuple[float, float]
    """95 %, of the draws of masks for these sequences; it does not speak of other sequences. Draws of a batch fill the
    range of t evenly, which the interval does not use: it is a little too wide."""
    by_block: list[float] = field(repr=False)
    """Nats a token of each block of the context, N of them: what a longer past is worth."""
    by_position: list[float] = field(repr=False)
    """Nats a token of each place inside a block, L of them."""
    tokens: int
    """Tokens that count."""
    num_draws: int
    protocol: str

    @property
    def perplexity(self) -> float:
        """exp of the bound."""
        return math.exp(min(700.0, self.nats_per_token))

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """exp of the interval."""
        low, high = (math.exp(min(700.0, end)) for end in self.interval)
        return low, high

    def bits_per_character(self, characters: int) -> float:
        """The bound in bits a character, of the characters that the counted tokens stand for."""
        return self.nats_per_token * self.tokens / (math.log(2) * characters)


@torch.no_grad()
def text_bound(
    model: ACDiTTransformer,
    batches: Iterable[Tensor],
    *,
    draw: str = "count",
    num_draws: int = 8,
    copies: int = 1,
    first_token_given: bool = False,
    seed: int = 0,
    processes: Processes | None = None,
) -> TextBound:
    """Average the bound over sequences and draws.

    Args:
        model: of token ids. One that is told t must be measured with "rate".
        batches: (B, S) token ids each; every sequence of the split once.
        draw: "rate" or "count".
        num_draws: draws of t and masks for each sequence; at least 2 for an interval. One token a block needs one.
        copies: how many of the draws share a clean pass: faster, for memory of C·S·V logits.
        first_token_given: the protocol in which BOS is known and does not count.
        seed: of the draws, which are keyed by draw and by the place of a sequence in the split.
        processes: share the batches, of which every one is handed to each; all get the same figures, those of a
            process alone. None: a process alone.

    Raises:
        ConfigError: a model of continuous data, no draw, an estimator that does not fit the model.
        DataError: no sequence, or token ids out of the vocabulary.
        NonFiniteError: a loss that is NaN or infinite.
    """
    if model.mask_token is None:
        raise ConfigError("model", found="a model of continuous data", expected="one with vocab_size")
    if num_draws < 1 or copies < 1:
        raise ConfigError("num_draws, copies", found=f"{num_draws}, {copies}", expected="at least 1 each")
    layout, device = model.layout, model.x_embedder.weight.device
    length, blocks = layout.block_tokens, layout.num_blocks
    if model.config.time_conditioning and draw == "count" and length > 1:
        raise ConfigError(
            "draw", found="'count', of a model that is told t", expected="'rate': 'count' integrates t out",
        )  # fmt: skip
    corruption = MaskingCorruption(length, model.mask_token, draw, first_token_given=first_token_given)
    counted = corruption.counted_tokens(blocks)
    num_draws = 1 if length == 1 else num_draws
    group = Processes() if processes is None else processes
    done: dict[int, tuple[Tensor, float]] = {}
    sequences = 0
    for index, tokens in enumerate(batches):
        if index % group.size != group.rank:
            sequences += len(tokens)
            continue
        clean = layout.to_blocks(_checked(tokens, model.mask_token, sequences)).to(device)
        total = torch.zeros(blocks, length, dtype=torch.float64)
        estimates = []
        for start in range(0, num_draws, copies):
            key: dict[str, Any] = {"seed": seed, "step": start, "copies": min(copies, num_draws - start)}
            # Streams named after the batch's first sequence: the strata are the batch's own.
            where = f"bound_{sequences}"
            rows = range(len(clean))
            u = draws.low_discrepancy(blocks, stream=where, samples=rows, batch_size=len(clean), **key)
            noise = draws.uniform((blocks, length), stream=f"{where}_noise", samples=rows, **key).to(device)
            timestep = corruption.timesteps(u).to(device)
            noisy = corruption.corrupt(clean[:, None], noise, timestep)
            (logits,) = model(clean, noisy, timestep, return_dict=False)
            losses = corruption.token_losses(logits, clean[:, None], noise, timestep).double().cpu()
            total += losses.sum(dim=(0, 1))
            estimates.append(losses.sum(dim=(-2, -1)) / counted)
        found = torch.cat(estimates, dim=1)  # (B, draws)
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).any(1).nonzero()[0])
            raise NonFiniteError(f"sequence {sequences + bad}", found="a loss that is no number", expected="a number")
        done[index] = total, float(found.var(dim=1).sum()) if num_draws > 1 else 0.0
        sequences += len(clean)
    if not sequences:
        raise DataError("text", found="no sequence", expected="at least one of the model's length")
    gathered = {index: part for one in group.gather(done) for index, part in one.items()}
    # Summed in the order of the batches, so that the figures do not depend on who measured which.
    parts = [part for _, part in sorted(gathered.items())]
    spread = sum(part[1] for part in parts)
    mean = torch.stack([part[0] for part in parts]).sum(0) / (sequences * num_draws)
    nats = float(mean.sum()) / counted
    half = math.inf if num_draws == 1 and length > 1 else NORMAL_95 * math.sqrt(spread / num_draws) / sequences
    return TextBound(
        nats_per_token=nats,
        interval=(nats - half, nats + half),
        by_block=_averages(mean, 1, first_token_given),
        by_position=_averages(mean, 0, first_token_given),
        tokens=counted * sequences,
        num_draws=num_draws,
        protocol=_protocol(corruption, layout.num_tokens),
    )


def count_characters(tokenizer: Tokenizer, batches: Iterable[Tensor], *, first_token_given: bool = False) -> int:
    """Characters that the counted tokens stand for; one whose tokens lie in two sequences counts once.

    Args:
        tokenizer: of the ids.
        batches: consecutive sequences (B, S).
        first_token_given: as in `text_bound`.
    """
    stream = tokenizer.stream()
    found = sum(len(stream.add(row[int(first_token_given) :])) for tokens in batches for row in tokens.tolist())
    return found + len(stream.finish())


def _averages(mean: Tensor, over: int, first_token_given: bool) -> list[float]:
    """Nats a counted token along the other axis of (N, L); NaN where none counts."""
    counts = torch.ones_like(mean)
    counts[0, 0] -= int(first_token_given)
    return (mean.sum(over) / counts.sum(over)).tolist()


def _checked(tokens: Tensor, vocab_size: int, first: int) -> Tensor:
    wrong = ((tokens < 0) | (tokens >= vocab_size)).nonzero()
    if len(wrong):
        row, *place = wrong[0].tolist()
        raise DataError(
            f"sequence {first + row}", found=f"token {int(tokens[row][tuple(place)])}",
            expected=f"token ids 0 … {vocab_size - 1}", fix="use the tokenizer that the model was trained with",
        )  # fmt: skip
    return tokens.long()


def _protocol(corruption: MaskingCorruption, context: int) -> str:
    if corruption.block_tokens == 1:
        what = "exact autoregressive likelihood"
    elif corruption.draw == "count":
        what = "upper bound, exact count of masked tokens"
    else:
        what = f"upper bound but for the cut, t on [{LOWEST_RATE:g}, 1]"
    first = "first token given, not counted" if corruption.first_token_given else "first token counted"
    return f"{what}; context {context}; {first}"
