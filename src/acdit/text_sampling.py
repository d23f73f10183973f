"""Sampling of text: blocks of tokens, revealed one after the other against the cache of the blocks before.

A block starts as mask tokens (the given ones of a prompt excepted), and a sampler reveals them. All samplers have one
signature; rows of a batch are independent, each with its own generator, so a text does not depend on its batch.
Categorical draws are made in fp64: in fp32 their rounding works like a lower temperature (Zheng et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acdit.cache import KVCache
from acdit.corruption.masking import TIMESTEPS
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer
from acdit.sampling import Generators, as_generators

Predict = Callable[[Tensor, Tensor], Tensor]
"""(tokens (B, L), t (B,)) → each token's distribution (B, L, V), fp64."""


class RowDraws:
    """Uniform fp64 draws for the rows of a batch: each from its own generator, or all from one."""

    def __init__(self, generators: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.generators, self.device = generators, device

    def uniform(self, rows: Tensor, count: int) -> Tensor:
        """(B, count) in [0, 1). Of generators of their own only those of `rows` (B,) are advanced."""
        one = self.generators
        if not isinstance(one, list):
            where = self.device if one is None else one.device
            return torch.rand(len(rows), count, generator=one, device=where, dtype=torch.float64).to(self.device)
        out = torch.zeros(len(rows), count, dtype=torch.float64)
        for row in rows.nonzero()[:, 0].tolist():
            out[row] = torch.rand(count, generator=one[row], device=one[row].device, dtype=torch.float64).cpu()
        return out.to(self.device)


def tempered(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Logits (…, V) → probabilities in fp64.

    Args:
        logits: of the model.
        temperature: divides the logits; 0 puts everything on the largest.
        top_p: nucleus (Holtzman et al. 2020): of the tempered distribution, the likeliest tokens that together reach
            this probability; at least one.
    """
    wide = logits.double()
    if temperature == 0:
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
    probabilities = torch.softmax(wide / temperature, dim=-1)
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < top_p  # what came before has not reached it yet
    kept[..., 0] = True
    ordered = ordered * kept
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))


def categorical(probabilities: Tensor, u: Tensor) -> Tensor:
    """Tokens (…) from distributions (…, V), fp64, by one uniform draw each: the inverse of the cumulative sum."""
    cumulative = probabilities.cumsum(-1)
    target = (u * cumulative[..., -1])[..., None]
    drawn = torch.searchsorted(cumulative, target, right=True)[..., 0]
    # Rounding may let u reach the very end: the last token that has any probability at all.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).to(torch.int8).argmax(-1)
    return torch.minimum(drawn, last)


@dataclass
class TextSamplingStep:
    """What a sampler reports: the block after one step."""

    block: int
    step: int
    tokens: Tensor
    """(B, L), masked ones `model.mask_token`."""
    called_model: bool
    """False where the prediction of the step before was used again."""


@dataclass(frozen=True)
class AncestralSampler:
    """Steps down an even grid of times; in each, a masked token is revealed with probability (t − s)/t (MDLM).

    Args:
        steps: a block.
    """

    steps: int = 64

    def step(self, step: int, masked: Tensor, probabilities: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """Which tokens are revealed now, and as what; see `sample_tokens` for who calls it.

        Args:
            step: index of the step in the block.
            masked: (B, L).
            probabilities: (B, L, V).
            draws: of the rows.

        Returns:
            (B, L) booleans, (B, L) tokens (of use where revealed).
        """
        u = draws.uniform(masked.any(-1), 2 * masked.shape[1])
        reveal, value = u.chunk(2, dim=-1)
        return masked & (reveal * (self.steps - step) < 1), categorical(probabilities, value)

    def time(self, step: int, masked: Tensor, previous: Tensor, draws: RowDraws) -> Tensor:
        """t of the state before the step, (B,)."""
        return torch.full_like(previous, 1 - step / self.steps)


@dataclass(frozen=True)
class FirstHittingSampler:
    """Jumps to the next time at which a token is revealed: t ← t·u^(1/m), one of the m masked, uniformly (Zheng et al.
    2024). The same distribution as infinitely many ancestral steps, in one model call a token."""

    def step(self, step: int, masked: Tensor, probabilities: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """See `AncestralSampler.step`."""
        u = draws.uniform(masked.any(-1), 2)
        place = _nth_masked(masked, (u[:, 0] * masked.sum(-1)).long())
        revealed = masked & (torch.arange(masked.shape[1], device=masked.device) == place[:, None])
        return revealed, categorical(probabilities, u[:, 1:].expand(masked.shape))

    def time(self, step: int, masked: Tensor, previous: Tensor, draws: RowDraws) -> Tensor:
        """t of the state before the step, (B,): from where the row was, one jump."""
        u = draws.uniform(masked.any(-1), 1)[:, 0]
        return previous * u ** (1 / masked.sum(-1).clamp(min=1))


@dataclass(frozen=True)
class ConfidenceSampler:
    """Reveals, in one step, every token of which the model is sure, and at least the surest one of a row.

    Sure is who gives its likeliest token at least `threshold`, under the distribution that is drawn from. That does not
    look at what is drawn, so each revealed token still follows the model's distribution; several at once are drawn
    independently of each other, which is what the speed costs.

    Args:
        threshold: above 1 one token a step; 0 the whole block at once.
    """

    threshold: float = 0.9

    def step(self, step: int, masked: Tensor, probabilities: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """See `AncestralSampler.step`."""
        confidence = probabilities.amax(-1).masked_fill(~masked, -1.0)
        surest = torch.arange(masked.shape[1], device=masked.device) == confidence.argmax(-1, keepdim=True)
        revealed = masked & (surest | (confidence >= self.threshold))
        return revealed, categorical(probabilities, draws.uniform(masked.any(-1), masked.shape[1]))

    def time(self, step: int, masked: Tensor, previous: Tensor, draws: RowDraws) -> Tensor:
        """The share of the block that is masked: the time at which so much is expected to be."""
        return masked.double().mean(-1)


Sampler = AncestralSampler | FirstHittingSampler | ConfidenceSampler
SAMPLERS = ("first_hitting", "ancestral", "confidence")
"""By name, for `make_sampler`."""


def make_sampler(name: str, num_inference_steps: int = 64, threshold: float = 0.9) -> Sampler:
    """The sampler of that name.

    Args:
        name: one of `SAMPLERS`.
        num_inference_steps: of the ancestral one, a block.
        threshold: of the one by confidence.

    Raises:
        ConfigError: there is none.
    """
    if name not in SAMPLERS:
        raise ConfigError("sampler", found=repr(name), expected=f"one of {SAMPLERS}")
    if name == "ancestral":
        return AncestralSampler(num_inference_steps)
    return ConfidenceSampler(threshold) if name == "confidence" else FirstHittingSampler()


def cut_text(row: list[int], prompt: int, max_new_tokens: int | None, eos_token: int | None) -> list[int]:
    """A row of tokens as far as it was asked for, without its own EOS.

    Args:
        row: prompt and what was written so far, whole blocks.
        prompt: tokens of it.
        max_new_tokens: asked for behind the prompt; None: all.
        eos_token: ends a text behind the prompt; None: nothing does.
    """
    row = row if max_new_tokens is None else row[: prompt + max_new_tokens]
    if eos_token is None:
        return row
    new = row[prompt:]
    return row[:prompt] + (new[: new.index(eos_token)] if eos_token in new else new)


def _nth_masked(masked: Tensor, n: Tensor) -> Tensor:
    """Position (B,) of each row's n-th (from 0) masked token."""
    return (masked.cumsum(-1) <= n[:, None]).sum(-1)


@torch.no_grad()
def sample_tokens(
    model: ACDiTTransformer,
    *,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    eos_token: int | None = None,
    cache: KVCache | None = None,
    generator: Generators = None,
    reuse: bool = True,
    on_step: Callable[[TextSamplingStep], None] | None = None,
) -> Iterator[Tensor]:
    """Write block after block; each is yielded as soon as it is finished.

    Args:
        model: of token ids; in any dtype.
        prompts: B lists of token ids, of any lengths, or (B, T). One alone serves all of `batch_size` rows. The given
            tokens of a block that a prompt ends in are revealed from the start. None: texts from nothing.
        batch_size: B, where prompts do not tell it; default 1.
        sampler: default `FirstHittingSampler()`.
        temperature, top_p: see `tempered`.
        max_new_tokens: tokens to write behind each prompt; the last block is finished all the same. Default: to the end
            of the grid. Beyond it only with a window.
        eos_token: a row ends where it has written one: the rest of its block, and of all blocks that follow, is filled
            with it; when all rows have ended, so does the generator. EOS in a prompt ends nothing.
        cache: to read the blocks into; default: a new one. It must be empty.
        generator: as in `acdit.sampling.sample_blocks`: a seed s gives row i the seed s + i and the same text in
            whatever batch it is in; a single `torch.Generator` or None draws for the whole batch.
        reuse: keep a prediction while no token of the batch has changed. It changes no text, and is off by itself where
            the model is told the time, on which the prediction then depends.
        on_step: called after every step of a sampler.

    Yields:
        (B, L) int64, one finished block after another, from the first that not all prompts fill: it holds prompt
        tokens too. A row that has written what it should is filled with `eos_token`, or with 0.

    Raises:
        ConfigError: a model of continuous data, token ids out of the vocabulary, a prompt longer than the context,
            settings out of range.
    """
    given, lengths = _prompts(model, prompts, batch_size)
    _require_settings(model, temperature, top_p, sampler, max_new_tokens, eos_token)
    sampler = FirstHittingSampler() if sampler is None else sampler
    batch, length, device = len(lengths), model.layout.block_tokens, model.execution_device
    generators = as_generators(generator, batch)
    ends = _ends(model, lengths, max_new_tokens, cache)
    first, stop = min(lengths) // length, max(math.ceil(end / length) for end in ends)
    if cache is None:
        cache = model.new_cache(batch, max(0, stop - 1))
    cache.require_fits(length, len(model.layers), model.config.num_attention_heads, stop - 1)
    if cache.num_blocks or cache.batch_size != batch:
        raise ConfigError(
            "cache", found=f"{cache.num_blocks} blocks of {cache.batch_size} samples",
            expected=f"an empty one of {batch}: what has been read goes into prompts",
        )  # fmt: skip
    writer = _Writer(model, sampler, temperature, top_p, reuse and not model.config.time_conditioning, on_step)
    draws = RowDraws(generators, device)
    filler = 0 if eos_token is None else eos_token
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    if first:
        model.prefill(given[:, : first * length].unflatten(1, (first, length)).to(device), cache)
    for block in range(first, stop):
        start = block * length
        tokens = torch.full((batch, length), model.mask_token or 0, device=device)
        shown = given[:, start : start + length].to(device)
        tokens[:, : shown.shape[1]] = torch.where(shown >= 0, shown, tokens[:, : shown.shape[1]])
        written = tokens == model.mask_token
        ended |= torch.tensor([end <= start for end in ends], device=device)
        tokens = torch.where(written & ended[:, None], filler, tokens)
        tokens = writer.write(tokens, block, cache, draws)
        if eos_token is not None:
            hit = (tokens == eos_token) & written
            tokens = torch.where(written & (hit.cumsum(-1) > 0), eos_token, tokens)
            ended |= hit.any(-1)
        yield tokens
        if block + 1 == stop or (eos_token is not None and bool(ended.all())):
            return
        model.prefill(tokens[:, None], cache)


@dataclass(frozen=True)
class _Writer:
    """Reveals one block after another."""

    model: ACDiTTransformer
    sampler: Sampler
    temperature: float
    top_p: float
    reuse: bool
    on_step: Callable[[TextSamplingStep], None] | None

    def write(self, tokens: Tensor, block: int, cache: KVCache, draws: RowDraws) -> Tensor:
        """Tokens (B, L) with every mask token revealed."""
        time = torch.ones(len(tokens), dtype=torch.float64, device=tokens.device)
        probabilities: Tensor | None = None
        step = 0
        while bool((masked := tokens.eq(self.model.mask_token or 0)).any()):
            time = self.sampler.time(step, masked, time, draws)
            calls = probabilities is None or not self.reuse
            if calls:
                logits = self.model.denoise(tokens, time * TIMESTEPS, None, cache)
                probabilities = tempered(logits, self.temperature, self.top_p)
            assert probabilities is not None
            revealed, values = self.sampler.step(step, masked, probabilities, draws)
            tokens = torch.where(revealed, values, tokens)
            if bool(revealed.any()):
                probabilities = None
            if self.on_step is not None:
                self.on_step(TextSamplingStep(block, step, tokens, calls))
            step += 1
        return tokens


def _prompts(
    model: ACDiTTransformer, prompts: Sequence[Sequence[int]] | Tensor | None, batch_size: int | None
) -> tuple[Tensor, list[int]]:
    """(B, T) token ids on the CPU, −1 behind a prompt's end, and the prompts' lengths."""
    if model.mask_token is None:
        raise ConfigError(
            "model", found="a model of continuous data", expected="one with vocab_size",
            fix="acdit.sampling.sample_blocks, or ACDiTPipeline",
        )  # fmt: skip
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(row) for row in prompts or []]
    rows = rows or [[]]
    if batch_size is not None:
        if len(rows) not in (1, batch_size):
            raise ConfigError("prompts", found=str(len(rows)), expected=f"1, or batch_size {batch_size}")
        rows = rows * batch_size if len(rows) == 1 else rows
    for index, row in enumerate(rows):
        wrong = [token for token in row if not (isinstance(token, int) and 0 <= token < model.mask_token)]
        if wrong:
            raise ConfigError(
                f"prompt {index}", found=f"token {wrong[0]!r}", expected=f"token ids 0 … {model.mask_token - 1}",
                fix="use the tokenizer that the model was trained with",
            )  # fmt: skip
    lengths = [len(row) for row in rows]
    given = torch.full((len(rows), max(lengths)), -1)
    for row, tokens in zip(given, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return given, lengths


def _ends(model: ACDiTTransformer, lengths: list[int], max_new_tokens: int | None, cache: KVCache | None) -> list[int]:
    """Tokens that each row has when it is done, prompt included."""
    context = model.layout.num_tokens
    bounded = (model.window if cache is None else cache.window) is None
    if bounded and max(lengths) >= context:
        raise ConfigError(
            f"prompt {lengths.index(max(lengths))}", found=f"{max(lengths)} tokens",
            expected=f"fewer than the context's {context}", fix="shorten it, or train a model with a window",
        )  # fmt: skip
    if max_new_tokens is None:
        if max(lengths) >= context:
            raise ConfigError("max_new_tokens", found="nothing", expected="a number: the prompt is beyond the grid")
        return [context] * len(lengths)
    ends = [length + max_new_tokens for length in lengths]
    if bounded and max(ends) > context:
        raise ConfigError(
            "max_new_tokens", found=f"{max_new_tokens} behind a prompt of {max(lengths)}",
            expected=f"at most {context} tokens in all, the context", fix="ask for less, or train with a window",
        )  # fmt: skip
    return ends


def _require_settings(
    model: ACDiTTransformer, temperature: float, top_p: float, sampler: Sampler | None,
    max_new_tokens: int | None, eos_token: int | None,
) -> None:  # fmt: skip
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError("temperature", found=str(temperature), expected="a number, at least 0")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", found=str(top_p), expected="above 0 and at most 1")
    if isinstance(sampler, AncestralSampler) and sampler.steps < 1:
        raise ConfigError("steps", found=str(sampler.steps), expected="at least 1")
    if isinstance(sampler, ConfidenceSampler) and not sampler.threshold >= 0:
        raise ConfigError("threshold", found=str(sampler.threshold), expected="at least 0")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError("max_new_tokens", found=str(max_new_tokens), expected="at least 1")
    if eos_token is not None and not 0 <= eos_token < (model.mask_token or 0):
        raise ConfigError("eos_token", found=str(eos_token), expected=f"a token id, 0 … {(model.mask_token or 1) - 1}")
