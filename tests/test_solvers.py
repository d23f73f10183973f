"""Solvers by name, and what a step shows of the clean block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from acdit.errors import ConfigError
from acdit.sampling import DenoisingStep, sample_blocks
from acdit.solvers import SOLVERS, fitting_solvers, make_solver
from tests.conftest import tiny_model


def test_only_fitting_solvers_are_made() -> None:
    assert set(fitting_solvers(DDPMScheduler())) == set(SOLVERS) - {"flow-euler"}
    assert set(fitting_solvers(FlowMatchEulerDiscreteScheduler())) == {"dpm++", "unipc", "flow-euler"}
    with pytest.raises(ConfigError, match="fits this model: ddim, ddpm"):
        make_solver(DDPMScheduler(), "flow-euler")
    with pytest.raises(ConfigError, match="dpm"):
        make_solver(FlowMatchEulerDiscreteScheduler(), "ddim")


KINDS = {
    "epsilon": DPMSolverMultistepScheduler(),
    "v_prediction": DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "sample": DPMSolverMultistepScheduler(prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, scheduler in KINDS.items() for name in fitting_solvers(scheduler)],
)
def test_the_estimate_ends_in_the_block(kind: str, name: str) -> None:
    """The last step of these solvers goes to what the model takes for clean."""
    model = tiny_model()
    solver = make_solver(KINDS[kind], name)
    seen: list[torch.Tensor] = []

    def on_step(state: DenoisingStep) -> None:
        seen.append(state.estimate())

    (block,) = sample_blocks(
        model, solver, class_labels=[1], num_blocks=1, num_inference_steps=5, guidance_scale=2.0, generator=0,
        on_step=on_step,
    )  # fmt: skip
    assert len(seen) == 5
    assert all(one.shape == block.shape and bool(one.isfinite().all()) for one in seen)
    tolerance = 1e-3 if name in ("ddim", "ddpm") else 1e-6  # these two stop a little above no noise
    scale = float(block.abs().max())
    assert (seen[-1] - block).abs().max() <= tolerance * scale * (20 if name == "ddpm" else 1)


def test_the_estimate_is_ddims_own() -> None:
    model = tiny_model()
    solver: Any = make_solver(KINDS["v_prediction"], "ddim")
    own: list[torch.Tensor] = []
    step = type(solver).step

    class Watched(type(solver)):  # type: ignore[misc]
        def step(self, *arguments: Any, **options: Any) -> Any:
            answer = step(self, *arguments, **{**options, "return_dict": True})
            own.append(answer.pred_original_sample)
            return (answer.prev_sample,)

    watched = Watched.from_config(solver.config)
    ours: list[torch.Tensor] = []
    list(
        sample_blocks(
            model, watched, class_labels=[1], num_blocks=1, num_inference_steps=4, generator=0,
            on_step=lambda state: ours.append(state.estimate()),
        )
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(ours), torch.stack(own), rtol=1e-6, atol=1e-6)
