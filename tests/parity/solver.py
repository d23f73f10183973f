"""The solver of the parity checks in fp64: with diffusers' own tables, in fp32, no sample is the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler


class FP64Solver(DPMSolverMultistepScheduler):
    """diffusers' solver on a linear schedule, with tables and so coefficients in fp64.

    In fp32 their last bits are each processor's own, and one of them moves a sample by up to 4e-7.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', from tables in fp64."""
        config = self.config
        assert config.beta_schedule == "linear"
        ends = (config.beta_start, config.beta_end)
        betas = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas.double()
