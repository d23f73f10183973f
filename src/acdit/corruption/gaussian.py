"""Gaussian corruption on diffusers' schedules (paper section 3.2, equations 2 and 3).

Draws come in from outside (`acdit.draws`): everything here is a function.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from acdit.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
TIMESTEP_DRAWS = ("uniform", "logit_normal")


class GaussianCorruption:
    """Noise, target and loss of continuous data; each block has its own timestep.

    Args:
        prediction_type: "epsilon" (the paper's), "v_prediction" (Salimans & Ho 2022) or "flow_prediction" (rectified
            flow: noisy = (1−σ)·clean + σ·noise, target noise − clean, σ = timestep / num_train_timesteps).
        num_train_timesteps, beta_schedule, beta_start, beta_end: diffusers' DDPM schedule; unused by flow.
        timestep_draw: "uniform", or "logit_normal" (Esser et al. 2024) with `logit_mean` and `logit_std`.
        min_snr_gamma: weight the loss by min(SNR, γ) of the clean data (Hang et al. 2023); None: unweighted.
    """

    noise = "normal"
    """Which draws `corrupt` wants."""

    def __init__(
        self,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        timestep_draw: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        min_snr_gamma: float | None = None,
    ) -> None:
        for name, value, known in (
            ("corruption.prediction_type", prediction_type, PREDICTION_TYPES),
            ("corruption.timestep_draw", timestep_draw, TIMESTEP_DRAWS),
        ):
            if value not in known:
                raise ConfigError(name, found=repr(value), expected=f"one of {known}")
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self.timestep_draw = timestep_draw
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.min_snr_gamma = min_snr_gamma
        self._schedule = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        self.scheduler = DDPMScheduler(**self._schedule)

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow_prediction"

    def sampling_scheduler(self) -> SchedulerMixin:
        """The scheduler to sample with: DPM-Solver++ (2M), the paper's; Euler for flow."""
        if self.is_flow:
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps)
        return DPMSolverMultistepScheduler(**self._schedule, prediction_type=self.prediction_type)

    def timesteps(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1) → timesteps of the same shape: integers, real numbers for flow."""
        if self.timestep_draw == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        return self.uniform_timesteps(u)

    def uniform_timesteps(self, u: Tensor) -> Tensor:
        """Shares of the schedule in [0, 1) → timesteps, whatever `timestep_draw` says."""
        if self.is_flow:
            return (u * self.num_train_timesteps).to(torch.float32)
        return (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noisy blocks.

        Args:
            clean: (B, N, L, D); or (B, 1, N, L, D) beside C noisy copies.
            noise: (B, N, L, D) or (B, C, N, L, D).
            timestep: (B, N) or (B, C, N).
        """
        clean = clean.expand_as(noise)
        if self.is_flow:
            sigma = self._sigma(timestep, noise)
            return (1 - sigma) * clean + sigma * noise
        flat = timestep.flatten()
        noisy = self.scheduler.add_noise(clean.flatten(0, timestep.ndim - 1), noise.flatten(0, timestep.ndim - 1), flat)
        return noisy.reshape(noise.shape)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model is asked to predict; shapes as in `corrupt`."""
        if self.prediction_type == "epsilon":
            return noise
        clean = clean.expand_as(noise)
        if self.is_flow:
            return noise - clean
        flat = timestep.flatten()
        velocity = self.scheduler.get_velocity(
            clean.flatten(0, timestep.ndim - 1), noise.flatten(0, timestep.ndim - 1), flat
        )
        return velocity.reshape(noise.shape)

    def split(self, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Clean data and noise that a prediction says a noisy block is made of: `corrupt` puts them together again.

        Args:
            noisy, prediction: (B, L, D).
            timestep: (B,).
        """
        if self.is_flow:
            sigma = self._sigma(timestep, noisy)
            return noisy - sigma * prediction, noisy + (1 - sigma) * prediction
        alpha = self.scheduler.alphas_cumprod.to(timestep.device, noisy.dtype)[timestep][..., None, None]
        signal, scale = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "epsilon":
            return (noisy - scale * prediction) / signal, prediction
        return signal * noisy - scale * prediction, scale * noisy + signal * prediction

    def loss_per_block(self, prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Mean squared error of each block, in fp32 or wider, shaped like `timestep` (paper equation 3)."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        error = prediction.to(wide) - self.target(clean, noise, timestep).to(wide)
        loss = error.square().mean(dim=(-2, -1))
        return loss if self.min_snr_gamma is None else loss * self._min_snr_weight(timestep).to(wide)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Mean over all blocks (and copies): a scalar."""
        return self.loss_per_block(prediction, clean, noise, timestep).mean()

    def _sigma(self, timestep: Tensor, like: Tensor) -> Tensor:
        return (timestep.to(like.dtype) / self.num_train_timesteps)[..., None, None]

    def _min_snr_weight(self, timestep: Tensor) -> Tensor:
        # The paper of min-SNR weights the error of the *clean* data by min(SNR, γ). Each target's error is that error
        # times (d clean / d prediction)², which is 1/SNR for ε, σ² for v and for flow.
        if self.is_flow:
            sigma = timestep.double() / self.num_train_timesteps
            snr, slope = ((1 - sigma) / sigma).square(), sigma.square()
            return torch.where(sigma > 0, snr.clamp(max=self.min_snr_gamma) * slope, 0.0)
        alpha = self.scheduler.alphas_cumprod.to(timestep.device, torch.float64)[timestep]
        snr = alpha / (1 - alpha)
        slope = 1 / snr if self.prediction_type == "epsilon" else 1 - alpha
        return snr.clamp(max=self.min_snr_gamma) * slope
