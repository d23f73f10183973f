"""Likelihood of continuous data: the variational bound of Gaussian diffusion by blocks; and the loss over timesteps.

The likelihood of a sample is a product over its blocks, each given the clean blocks before it, and a block is drawn by
a diffusion process: −log p(x) ≤ Σ_i (prior_i + diffusion_i + decoder_i) (Ho et al. 2020, equation 5, of every block):

- prior: KL(q(x_T | x_0) ‖ N(0, 1));
- diffusion: Σ_t KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t, clean_<i)), of ancestral sampling with fixed variances, the
  "small" ones of the posterior or the "large" ones β_t;
- decoder: −log p(x_0 | x_1), a Gaussian. Of 8-bit pixels the mass of the value's bin, so that the bound is one on the
  probability of the pixels; of latents its density, so that bits can be negative.

The variance of the decoder is β_1 of a density; of pixels that of the posterior one step before, as in the code of
Improved DDPM (at the last step the posterior has none). Of a perfect predictor the bound of a density closes as steps
grow under "large" variances; under "small" ones 0.42 bits a dimension and more stay, by the schedule: the first steps
are too narrow for what the predicted clean data leave open. Every timestep of a block has its own noise, keyed by
sample; all blocks are one forward of the model.

The sum over timesteps is estimated from a few of them, drawn with probabilities as the terms would be were the data
white noise of unit variance (mixed with uniform ones, so that no term is drawn too rarely); the estimate is unbiased
whatever the data are. The last step, which is the decoder's, is taken in every draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acdit import draws
from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.evaluation.intervals import NORMAL_95
from acdit.model import ACDiTTransformer

VARIANCES = ("large", "small")
PARTS = ("prior", "diffusion", "decoder")
_UNIFORM_SHARE = 0.2
"""Of the timesteps that are drawn evenly, whatever the schedule says."""
_AT_ONCE = 16
"""Noisy copies that share a clean pass."""

Batch = tuple[Tensor, Tensor | None]
"""Clean blocks (B, N, L, D) in model space, and labels (B,) or None."""


@dataclass(frozen=True)
class EightBit:
    """Pixels of 256 values in model space: value v stands at (v/255 − mean) / std."""

    mean: float = 0.5
    std: float = 0.5

    @property
    def half_bin(self) -> float:
        """Half the distance of two values."""
        return 0.5 / (255 * self.std)

    @property
    def ends(self) -> tuple[float, float]:
        """Where 0 and 255 stand."""
        return -self.mean / self.std, (1 - self.mean) / self.std


@dataclass(frozen=True)
class BlockBound:
    """What one block costs, in bits a dimension of the block."""

    bits_per_dim: float
    interval: tuple[float, float]
    """95 %, of the draws of timesteps and noise for these samples; it does not speak of other samples."""
    prior: float
    diffusion: float
    decoder: float


@dataclass(frozen=True)
class GaussianBound(BlockBound):
    """What a split costs a model, in bits a dimension of the whole."""

    by_block: list[BlockBound] = field(repr=False)
    samples: int
    dimensions: int
    """Of a sample."""
    num_draws: int
    protocol: str


class BoundTerms:
    """The bound's terms as functions; all in fp64.

    Args:
        corruption: of ε- or v-prediction, whose schedule is the process.
        variance: "large" or "small".
        pixels: how pixels stand in model space; None: the data are real numbers.
        clip: clip predicted clean data to the range of pixels, as DDPM's and ADM's evaluation do.

    Raises:
        ConfigError: flow, which is no such process; an unknown variance; clipping what are no pixels.
    """

    def __init__(
        self,
        corruption: GaussianCorruption,
        variance: str = "large",
        pixels: EightBit | None = None,
        clip: bool = False,
    ) -> None:
        if corruption.is_flow:
            raise ConfigError(
                "corruption.prediction_type", found="'flow_prediction'",
                expected="'epsilon' or 'v_prediction': flow samples by an ODE, the bound is one of ancestral sampling",
            )  # fmt: skip
        if variance not in VARIANCES:
            raise ConfigError("variance", found=repr(variance), expected=f"one of {VARIANCES}")
        if clip and pixels is None:
            raise ConfigError("clip", found="data that are no pixels", expected="pixels, which have a range")
        self.corruption, self.variance, self.pixels, self.clip = corruption, variance, pixels, clip
        alphas = corruption.scheduler.alphas_cumprod.double()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        betas = 1 - alphas / before
        self.alphas = alphas
        self.posterior = betas * (1 - before) / (1 - alphas)
        """Variance of q(x_{t−1} | x_t, x_0), 0 at t = 0."""
        self.of_clean = before.sqrt() * betas / (1 - alphas)
        """How much of the posterior's mean is clean data; the rest is the same for q and p."""
        self.decoder_variance = float(betas[0] if pixels is None or len(betas) == 1 else self.posterior[1])
        self.model_variance = self.posterior.clone() if variance == "small" else betas.clone()

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    def prior(self, clean: Tensor) -> Tensor:
        """Nats of a block whose end is taken for noise: (…, L, D) → (…)."""
        alpha = float(self.alphas[-1])
        return 0.5 * (alpha * clean.double().square() - alpha - math.log1p(-alpha)).sum((-2, -1))

    def steps(self, clean: Tensor, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Nats of one step each: the divergence for t > 0, the decoder for t = 0.

        Args:
            clean, noisy, prediction: (…, L, D).
            timestep: (…).
        """
        found, _ = self.corruption.split(noisy.double(), prediction.double(), timestep)
        if self.clip:
            assert self.pixels is not None
            found = found.clamp(*self.pixels.ends)
        clean = clean.double().expand_as(found)
        t = timestep.to("cpu")
        of_clean, model, posterior = (
            table[t].to(found.device)[..., None, None] for table in (self.of_clean, self.model_variance, self.posterior)
        )
        first = (timestep == 0)[..., None, None]
        ratio = torch.where(first, 1.0, posterior / model)
        moved = (of_clean * (clean - found)).square() / torch.where(first, 1.0, model)
        divergence = 0.5 * (moved + ratio - 1 - ratio.log())
        nats = torch.where(first, self._decoder(clean, found), divergence)
        return nats.sum((-2, -1))

    def _decoder(self, clean: Tensor, mean: Tensor) -> Tensor:
        """−log p(x_0 | x_1) of each number; there the mean is the predicted clean data."""
        scale = math.sqrt(self.decoder_variance)
        if self.pixels is None:
            return 0.5 * ((clean - mean) / scale).square() + math.log(scale) + 0.5 * math.log(2 * math.pi)
        low, high = self.pixels.ends
        half = self.pixels.half_bin
        start = torch.where(clean < low + half, -math.inf, (clean - half - mean) / scale)
        stop = torch.where(clean > high - half, math.inf, (clean + half - mean) / scale)
        # In the tail that is the smaller one, where no digits cancel.
        mirrored = start + stop > 0
        start, stop = torch.where(mirrored, -stop, start), torch.where(mirrored, -start, stop)
        upper, lower = torch.special.log_ndtr(stop), torch.special.log_ndtr(start)
        return -(upper + torch.log1p(-(lower - upper).exp()))

    def probabilities(self) -> Tensor:
        """Of drawing each timestep 1 … T−1, (T−1,)."""
        snr = self.alphas / (1 - self.alphas)
        spread = torch.log1p(snr[:-1]) - torch.log1p(snr[1:])
        return (1 - _UNIFORM_SHARE) * spread / spread.sum() + _UNIFORM_SHARE / len(spread)


@torch.no_grad()
def gaussian_bound(
    model: ACDiTTransformer,
    terms: BoundTerms,
    batches: Iterable[Batch],
    *,
    num_timesteps: int | None = 8,
    num_draws: int = 4,
    seed: int = 0,
) -> GaussianBound:
    """Average the bound over samples and draws.

    Args:
        model: predicts what the corruption of `terms` says, of continuous data.
        terms: of the bound.
        batches: every sample of the split once; with labels the bound is one on p(x | label).
        num_timesteps: of a draw, besides the last step; they share a clean pass. None: all of them, T calls a draw, and
            the interval is of the noise alone.
        num_draws: repetitions; at least 2 for an interval.
        seed: of the draws, which are keyed by draw and by the place of a sample in the split.

    Raises:
        ConfigError: a model of text, nothing to draw.
        DataError: no sample.
        NonFiniteError: a term that is NaN or infinite.
    """
    _require_fitting(model, num_draws, 1 if num_timesteps is None else num_timesteps)
    layout, total = model.layout, terms.num_timesteps
    blocks, seen = layout.num_blocks, 0
    sums = torch.zeros(len(PARTS), blocks, dtype=torch.float64)
    spread = torch.zeros(blocks + 1, dtype=torch.float64)
    size, labelled = 0, False
    for clean, labels in batches:
        size, labelled = clean.shape[2] * clean.shape[3], labels is not None
        rows = range(seen, seen + len(clean))
        estimates = []
        for draw in range(num_draws):
            key: dict[str, Any] = {"seed": seed, "step": draw, "samples": rows}
            timestep, weight = _timesteps(terms, blocks, num_timesteps, key)
            nats = _steps(model, terms, clean, labels, timestep, key) * weight
            parts = torch.stack([terms.prior(clean).cpu(), nats[:, 1:].sum(1), nats[:, 0]])
            sums += parts.sum(1)
            estimates.append(parts.sum(0))
        found = torch.stack(estimates)  # (draws, B, N)
        if not bool(torch.isfinite(found).all()):
            bad = seen + int((~torch.isfinite(found)).any(0).any(-1).nonzero()[0])
            raise NonFiniteError(f"sample {bad}", found="a bound that is no number", expected="a number")
        if num_draws > 1:
            both = torch.cat([found, found.sum(-1, keepdim=True)], dim=-1)
            spread += both.var(dim=0).sum(0)
        seen += len(clean)
    if not seen:
        raise DataError("data", found="no sample", expected="at least one")
    bits = 1 / (math.log(2) * size)
    mean = sums / (seen * num_draws) * bits
    half = torch.full_like(spread, math.inf)
    if num_draws > 1:
        half = NORMAL_95 * (spread / num_draws).sqrt() / seen * bits
    half[-1] /= blocks
    taken = total if num_timesteps is None else 1 + min(num_timesteps, total - 1)
    return GaussianBound(
        **_bounded(mean.mean(1), float(half[-1])),
        by_block=[BlockBound(**_bounded(mean[:, block], float(half[block]))) for block in range(blocks)],
        samples=seen,
        dimensions=blocks * size,
        num_draws=num_draws,
        protocol=_protocol(terms, taken, labelled),
    )


@torch.no_grad()
def loss_over_timesteps(
    model: ACDiTTransformer,
    corruption: GaussianCorruption,
    batches: Iterable[Batch],
    timesteps: Tensor,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The training loss of each block, unweighted, at the same timestep in all blocks.

    Args:
        model: of continuous data.
        corruption: what it was trained with, flow included.
        batches: every sample of the split once.
        timesteps: (K,) of them, integers but for flow.
        seed: of the noise, keyed by timestep's place and by the place of a sample in the split.

    Returns:
        Mean over the samples and its standard error, (K, N) each, fp64.

    Raises:
        ConfigError: a model of text.
        DataError: no sample.
    """
    _require_fitting(model, 1, len(timesteps))
    device = model.x_embedder.weight.device
    seen, total, squares = 0, torch.zeros(()), torch.zeros(())
    for clean, labels in batches:
        rows = range(seen, seen + len(clean))
        columns = []
        shape = tuple(clean.shape[1:])
        for start in range(0, len(timesteps), _AT_ONCE):
            part = timesteps[start : start + _AT_ONCE].to(device)
            noise = draws.normal(
                shape, seed=seed, stream="loss_noise", step=start, samples=rows, copies=len(part)
            ).to(device, clean.dtype)  # fmt: skip
            timestep = part[None, :, None].expand(len(clean), -1, shape[0])
            noisy = corruption.corrupt(clean[:, None], noise, timestep)
            (prediction,) = model(clean, noisy, timestep, labels, return_dict=False)
            error = prediction.double() - corruption.target(clean[:, None], noise, timestep).double()
            columns.append(error.square().mean((-2, -1)).cpu())
        losses = torch.cat(columns, dim=1)  # (B, K, N)
        total, squares = total + losses.sum(0), squares + losses.square().sum(0)
        seen += len(clean)
    if not seen:
        raise DataError("data", found="no sample", expected="at least one")
    mean = total / seen
    variance = (squares / seen - mean.square()).clamp(min=0) * seen / max(1, seen - 1)
    return mean, (variance / seen).sqrt()


def _timesteps(terms: BoundTerms, blocks: int, num_timesteps: int | None, key: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Timesteps of the copies and how often their terms count, (B, C, N) each; copy 0 is the last step."""
    batch, last = len(key["samples"]), terms.num_timesteps - 1
    first = torch.zeros(batch, 1, blocks, dtype=torch.int64)
    if num_timesteps is None or num_timesteps >= last:
        every = torch.arange(1, last + 1)[None, :, None].expand(batch, -1, blocks)
        timestep = torch.cat([first, every], dim=1)
        return timestep, torch.ones_like(timestep, dtype=torch.float64)
    # One draw from each of as many strata of equal probability: the sum over them is unbiased and varies less.
    u = draws.uniform((num_timesteps, blocks), stream="bound_timestep", **key)
    u = (torch.arange(num_timesteps)[None, :, None] + u) / num_timesteps
    chances = terms.probabilities()
    index = torch.searchsorted(chances.cumsum(0), u, right=True).clamp(max=last - 1)
    weight = 1 / (num_timesteps * chances[index])
    return torch.cat([first, index + 1], dim=1), torch.cat([torch.ones_like(first, dtype=torch.float64), weight], dim=1)


def _steps(
    model: ACDiTTransformer,
    terms: BoundTerms,
    clean: Tensor,
    labels: Tensor | None,
    timestep: Tensor,
    key: dict[str, Any],
) -> Tensor:
    """Nats of each copy and block, (B, C, N), on the CPU."""
    device, found = clean.device, []
    for start in range(0, timestep.shape[1], _AT_ONCE):
        part = timestep[:, start : start + _AT_ONCE]
        shape, copies = tuple(clean.shape[1:]), part.shape[1]
        noise = draws.normal(shape, stream=f"bound_noise_{start}", copies=copies, **key).to(device, clean.dtype)
        part = part.to(device)
        noisy = terms.corruption.corrupt(clean[:, None], noise, part)
        (prediction,) = model(clean, noisy, part, labels, return_dict=False)
        found.append(terms.steps(clean[:, None], noisy, prediction, part).cpu())
    return torch.cat(found, dim=1)


def _bounded(parts: Tensor, half: float) -> dict[str, Any]:
    value = float(parts.sum())
    named = dict(zip(PARTS, parts.tolist(), strict=True))
    return {"bits_per_dim": value, "interval": (value - half, value + half), **named}


def _protocol(terms: BoundTerms, taken: int, labelled: bool) -> str:
    data = "pixels of 8 bits" if terms.pixels is not None else "density of real numbers, which can be negative"
    which = f"{taken} of {terms.num_timesteps} steps a draw" if taken < terms.num_timesteps else "all steps a draw"
    clipped = ", predicted data clipped" if terms.clip else ""
    given = "given the labels" if labelled else "no label"
    return (
        f"upper bound of ancestral sampling, {terms.variance} variances, {terms.num_timesteps} steps{clipped}; {data}; "
        f"{which}; {given}; blocks given the clean blocks before them"
    )


def _require_fitting(model: ACDiTTransformer, num_draws: int, timesteps: int) -> None:
    if model.mask_token is not None:
        raise ConfigError(
            "model", found="a model of text", expected="one of continuous data", fix="acdit evaluate measures text"
        )
    if num_draws < 1 or timesteps < 1:
        raise ConfigError("draws, timesteps", found=f"{num_draws}, {timesteps}", expected="at least 1 each")
