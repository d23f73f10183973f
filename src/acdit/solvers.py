"""Solvers by short names: which diffusers scheduler a name means, and which of them fit a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acdit.errors import ConfigError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
_FLOW = ("dpm++", "unipc", "flow-euler")


def fitting_solvers(scheduler: SchedulerMixin) -> tuple[str, ...]:
    """Names of the solvers for what the scheduler's model predicts: flow, or noise and its like."""
    return _FLOW if _predicts_flow(scheduler) else tuple(name for name in SOLVERS if name != "flow-euler")


def make_solver(scheduler: SchedulerMixin, name: str, field: str = "solver") -> Any:
    """The scheduler that `name` means, with the noise schedule and the prediction type of a given one.

    Args:
        scheduler: the model's own.
        name: one of `SOLVERS`.
        field: what an error calls the choice.

    Raises:
        ConfigError: an unknown name, or one of another kind than the model was trained for.
    """
    import diffusers

    fitting = fitting_solvers(scheduler)
    if name not in fitting:
        raise ConfigError(field, found=str(name), expected=f"one that fits this model: {', '.join(sorted(fitting))}")
    extra: dict[str, Any] = {}
    if _predicts_flow(scheduler) and name != "flow-euler":
        extra = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if name in ("ddim", "ddpm"):
        extra = {"clip_sample": False}  # their default clips the clean data to ±1: latents are not in there
    return getattr(diffusers, SOLVERS[name]).from_config(scheduler.config, **extra)


def _predicts_flow(scheduler: SchedulerMixin) -> bool:
    kind = getattr(scheduler.config, "prediction_type", None)
    return kind == "flow_prediction" or type(scheduler).__name__ == SOLVERS["flow-euler"]
