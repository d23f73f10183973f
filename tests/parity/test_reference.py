"""Converted weights give what the reference gives: the training forward, and the 25-step guided sample (spec §8).

In fp64 the reference was recorded with its casts to fp32 lifted, those of the solver included, so ours is sampled with
the solver's lifted as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from acdit import ACDiTTransformer, sampling
from acdit.convert import read_reference
from acdit.corruption.gaussian import GaussianCorruption
from tests.parity.solver import FP64Solver

from .conftest import Recorded

PRECISIONS = [pytest.param(torch.float32, 1e-5, id="fp32"), pytest.param(torch.float64, 1e-10, id="fp64")]


class KeepDouble(TorchFunctionMode):
    """diffusers' solver computes in fp32 whatever it is given; under this mode fp64 stays fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args[0].dtype == torch.float64 and args[1:2] == (torch.float32,):
            return args[0]
        return func(*args, **(kwargs or {}))


def converted(reference: Recorded, folder: Path, dtype: torch.dtype) -> ACDiTTransformer:
    read = read_reference(reference.checkpoint(folder, dtype))
    model = ACDiTTransformer(**read.config).to(dtype)
    model.load_state_dict(read.weights)
    return model


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_training_forward_is_the_references(
    reference: Recorded, tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    model = converted(reference, tmp_path, dtype)
    inputs = reference.inputs
    theirs = reference.outputs[f"fp{torch.finfo(dtype).bits}.forward"]
    assert len(inputs["timestep"].unique()) == inputs["timestep"].numel()
    with torch.no_grad():
        ours = model(inputs["clean"].to(dtype), inputs["noisy"].to(dtype), inputs["timestep"], inputs["labels"]).sample
    assert theirs.dtype == dtype
    assert float(theirs.std()) > 0.1
    for block in range(model.layout.num_blocks):
        assert relative_error(ours[:, block], theirs[:, block]) <= bound


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_guided_sample_is_the_references(
    reference: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float
) -> None:
    model = converted(reference, tmp_path, dtype)
    scheduler = GaussianCorruption().sampling_scheduler()
    if dtype == torch.float64:
        scheduler = FP64Solver.from_config(scheduler.config)
    noises = iter(reference.inputs["noises"].to(dtype))
    monkeypatch.setattr(sampling, "_noise", lambda shape, generator, device: next(noises))
    with KeepDouble() if dtype == torch.float64 else contextlib.nullcontext():
        blocks = sampling.sample_blocks(
            model,
            scheduler,
            class_labels=reference.inputs["sample_labels"],
            num_inference_steps=reference.num_inference_steps,
            guidance_scale=reference.guidance_scale,
        )
        ours = torch.stack(list(blocks), dim=1)
    theirs = reference.outputs[f"fp{torch.finfo(dtype).bits}.sample"]
    assert ours.dtype == theirs.dtype == dtype
    assert relative_error(ours, theirs) <= bound
