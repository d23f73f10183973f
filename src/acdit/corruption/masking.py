"""Masking: absorbing-state diffusion of tokens (MDLM, Sahoo et al. 2024; by blocks, BD3-LMs, Arriola et al. 2025).

Each block has its own mask rate t. Masked tokens are predicted, the others are known (SUBS: the mask token is never
predicted, unmasked tokens are copied), and the loss Σ_masked CE / t is an upper bound of the negative log-likelihood.
Draws come in from outside (`acdit.draws`): everything here is a function.

A timestep is t times `TIMESTEPS`, as in flow: the unit that the transformer's embedder is made for.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from acdit.errors import ConfigError

MASK_DRAWS = ("rate", "count")
TIMESTEPS = 1000
"""What t = 1 is called towards the model."""
LOWEST_RATE = 1e-3
"""Where the draw of rates is cut, in the protocol of MDLM and BD3-LMs."""


class MaskingCorruption:
    """Masks, prediction and loss of tokens; each block has its own timestep.

    Two draws of what is masked, and with the whole range two estimators of the same bound:

    - "rate": t uniform on [1e-3, 1], every token masked with probability t, weight 1/t: the peers' protocol. The cut
      leaves out what lies below 1e-3 (less than a thousandth of the range) and makes it a bound but for that.
    - "count": m uniform on 1 … L, exactly m tokens masked, weight L/m, which is 1/t at t = m/L. It is the "rate"
      estimator's integral over t, without the cut and without blocks in which nothing is masked: exact, and of a lower
      variance, for a model that is not told t.

    With L = 1 both mask the one token with weight 1: the exact autoregressive likelihood.

    Args:
        block_tokens: L.
        mask_token: id of the absorbing state, V.
        draw: "rate" or "count".
        mask_range: [β, ω] of the rates to train on (BD3-LMs' clipped schedules); with [0, 1] the loss is the bound.
        first_token_given: the first token of a sequence is never masked and does not count: the protocol in which BOS
            is known.

    Raises:
        ConfigError: an unknown draw, a range that is none or holds no count of the block.
    """

    noise = "uniform"
    """Which draws `corrupt` wants: uniform ones in [0, 1)."""

    def __init__(
        self,
        block_tokens: int,
        mask_token: int,
        draw: str = "rate",
        mask_range: tuple[float, float] = (0.0, 1.0),
        first_token_given: bool = False,
    ) -> None:
        if draw not in MASK_DRAWS:
            raise ConfigError("corruption.mask_draw", found=repr(draw), expected=f"one of {MASK_DRAWS}")
        self.block_tokens, self.mask_token = block_tokens, mask_token
        self.draw, self.first_token_given = draw, first_token_given
        self.set_range(mask_range)

    def set_range(self, mask_range: tuple[float, float]) -> None:
        """Train on another range from now on."""
        low, high = mask_range
        where = "corruption.mask_range"
        if not 0 <= low < high <= 1:
            raise ConfigError(where, found=f"[{low:g}, {high:g}]", expected="0 ≤ β < ω ≤ 1")
        if self.draw == "rate" and high <= LOWEST_RATE:
            raise ConfigError(where, found=f"[{low:g}, {high:g}]", expected=f"ω above {LOWEST_RATE:g}")
        if self.block_tokens == 1 and (low, high) != (0, 1):
            raise ConfigError(where, found=f"[{low:g}, {high:g}]", expected="[0, 1]: the one token is always masked")
        if not self.allows((low, high)):
            raise ConfigError(
                where, found=f"[{low:g}, {high:g}], in which no count of {self.block_tokens} tokens lies",
                expected=f"a range that holds a multiple of 1/{self.block_tokens}",
            )  # fmt: skip
        self.mask_range = (float(low), float(high))

    def allows(self, mask_range: tuple[float, float]) -> bool:
        """Whether there is something to draw from in a range."""
        frees = {self.block_tokens, self.block_tokens - self.first_token_given} - {0, 1}
        return self.draw == "rate" or all(self._counts(free, mask_range)[1] > 0 for free in frees)

    @staticmethod
    def _counts(free: int, mask_range: tuple[float, float]) -> tuple[int, int]:
        """First count in the range, and how many there are."""
        slack = 1e-9  # 0.3 of 10 is 3, whatever binary fractions say
        first = max(1, math.ceil(mask_range[0] * free - slack))
        return first, math.floor(mask_range[1] * free + slack) - first + 1

    # --- draws ------------------------------------------------------------------------------------------------------

    def timesteps(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1), (…, N), the last axis all blocks of a sequence → timesteps of that shape, fp64."""
        rates = self._rates(u.double(), self.block_tokens)
        if self.first_token_given:
            rates[..., 0] = self._rates(u[..., 0].double(), self.block_tokens - 1)
        return rates * TIMESTEPS

    def _rates(self, u: Tensor, free: int) -> Tensor:
        """Rates of blocks in which so many tokens can be masked."""
        if free <= 1:
            return torch.ones_like(u)
        if self.draw == "count":
            first, many = self._counts(free, self.mask_range)
            return (first + (u * many).floor()) / free
        low, high = max(self.mask_range[0], LOWEST_RATE), self.mask_range[1]
        return high - u * (high - low)  # never 0

    def masked(self, noise: Tensor, timestep: Tensor) -> Tensor:
        """Which tokens are masked.

        Args:
            noise: (…, N, L), uniform draws in [0, 1).
            timestep: (…, N).

        Returns:
            (…, N, L) booleans.
        """
        rate = self.rate(timestep)[..., None].to(noise)
        free = torch.full(noise.shape[-2:-1], self.block_tokens, device=noise.device)
        if self.first_token_given:
            noise, free = noise.clone(), free.clone()
            noise[..., 0, 0] = 2.0  # beyond every rate, and the last of every order
            free[0] -= 1
        if self.draw == "rate":
            return noise < rate
        order = noise.argsort(dim=-1).argsort(dim=-1)
        return order < (rate * free[:, None]).round()

    def rate(self, timestep: Tensor) -> Tensor:
        """t of timesteps, fp64."""
        return timestep.double() / TIMESTEPS

    # --- corruption, prediction, loss -------------------------------------------------------------------------------

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noisy blocks.

        Args:
            clean: (B, N, L) token ids; or (B, 1, N, L) beside C noisy copies.
            noise: (B, N, L) or (B, C, N, L), uniform draws in [0, 1).
            timestep: (B, N) or (B, C, N).
        """
        return torch.where(self.masked(noise, timestep), self.mask_token, clean)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model is asked for, wherever a token is masked; shapes as in `corrupt`."""
        return clean.expand(noise.shape)

    def log_probabilities(self, logits: Tensor, noisy: Tensor) -> Tensor:
        """SUBS: the model's distribution where a token is masked, the token itself where it is not.

        Args:
            logits: (…, V): there is no logit for the mask token, so it is never predicted.
            noisy: (…) token ids.

        Returns:
            (…, V), log-probabilities in fp32 or wider.
        """
        known = noisy != self.mask_token
        log_p = torch.log_softmax(logits.to(_wide(logits)), dim=-1)
        copied = F.one_hot(torch.where(known, noisy, 0), logits.shape[-1]).to(log_p).log()
        return torch.where(known[..., None], copied, log_p)

    def token_losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Each token's part of the bound: CE / t where it is masked, else 0, in fp32 or wider, shaped like `noise`.

        Args:
            prediction: (…, N, L, V) logits for `corrupt`'s noisy blocks.
            clean, noise, timestep: as in `corrupt`.
        """
        wide = _wide(prediction)
        target = self.target(clean, noise, timestep)
        entropy = F.cross_entropy(prediction.to(wide).flatten(0, -2), target.flatten(), reduction="none")
        weight = self.masked(noise, timestep) / self.rate(timestep)[..., None]
        return entropy.reshape(noise.shape) * weight.to(wide)

    def loss_per_block(self, prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Σ_masked CE / t over L of each block, nats a token, shaped like `timestep`."""
        return self.token_losses(prediction, clean, noise, timestep).mean(dim=-1)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Nats per token that counts, the mean over all: a scalar."""
        loss = self.loss_per_block(prediction, clean, noise, timestep).mean()
        tokens = noise.shape[-1] * noise.shape[-2]
        return loss * (tokens / self.counted_tokens(noise.shape[-2]))

    def counted_tokens(self, num_blocks: int) -> int:
        """Tokens of a sequence of so many blocks that count."""
        return num_blocks * self.block_tokens - self.first_token_given


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def candidate_ranges(width: float = 0.5, step: float = 0.05) -> list[tuple[float, float]]:
    """Ranges of one width, shifted by `step`: what BD3-LMs search among."""
    count = round((1 - width) / step)
    return [(round(index * step, 6), round(index * step + width, 6)) for index in range(count + 1)]


def range_variances(
    timestep_shares: Tensor, losses: Tensor, ranges: list[tuple[float, float]]
) -> dict[tuple[float, float], float]:
    """Variance of the loss of a block, for each range of mask rates that it could be trained on.

    BD3-LMs choose the range in which the bound varies least: that is where gradients do. Losses at rates drawn over the
    whole range serve for every candidate, since a uniform draw that falls into [β, ω] is a uniform draw from it.

    Args:
        timestep_shares: (M,) mask rates t, drawn uniformly.
        losses: (M,) the blocks' losses at these rates.
        ranges: candidates (β, ω).

    Returns:
        Unbiased variance by range; infinite where fewer than two losses lie in it.
    """
    found = {}
    for low, high in ranges:
        inside = losses[(timestep_shares >= low) & (timestep_shares <= high)].double()
        found[low, high] = float(inside.var()) if len(inside) > 1 else math.inf
    return found
