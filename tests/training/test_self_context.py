"""Context of the model's own making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError
from acdit.training import Trainer, build
from acdit.training.batches import Batch, Batches
from acdit.training.self_context import own_context
from tests.conftest import blocks_like, tiny_model
from tests.training.runs import run, state_hash, tiny_recipe

KEY: dict[str, Any] = {"seed": 3, "step": 0, "samples": range(16)}
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_split_is_the_inverse_of_corrupt(kind: str) -> None:
    corruption = GaussianCorruption(kind)
    clean, noise = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    timestep = corruption.uniform_timesteps(torch.rand(6))
    noisy = corruption.corrupt(clean, noise, timestep)
    made, left = corruption.split(noisy, corruption.target(clean, noise, timestep), timestep)
    torch.testing.assert_close(made, clean, rtol=0, atol=1e-4)  # the schedule is fp32, and 1/signal reaches 150
    torch.testing.assert_close(left, noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_perfect_model_makes_the_data(kind: str, steps: int) -> None:
    """A model that knows the answer: its own context is the data, at every level and number of steps."""
    corruption, model = GaussianCorruption(kind), tiny_model()
    clean = blocks_like(model, 16)
    truth: list[torch.Tensor] = []

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor, labels: Any, cache: Any) -> torch.Tensor:
        data = clean[:, cache.num_blocks]
        truth.append(data)
        if corruption.is_flow:
            sigma = (timestep.double() / 1000)[:, None, None]
            return (noisy - data) / sigma.clamp(min=1e-9)
        alpha = corruption.scheduler.alphas_cumprod.double()[timestep][:, None, None]
        noise = (noisy - alpha.sqrt() * data) / (1 - alpha).sqrt()
        return noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * data

    model.denoise = denoise  # type: ignore[method-assign,assignment]
    context = own_context(model, corruption, clean, None, share=1.0, steps=steps, strength=0.9, key=KEY)
    assert len(truth) == 3 * steps
    torch.testing.assert_close(context, clean, rtol=0, atol=1e-3)


def test_it_is_sampling_from_the_level_on_with_the_models_own_past() -> None:
    """By hand, one step: the prediction for the corrupted block against a cache of the model's own blocks."""
    corruption, model = GaussianCorruption("v_prediction"), tiny_model()
    clean, labels = blocks_like(model, 16), torch.arange(16) % 5
    context = own_context(model, corruption, clean, labels, share=0.5, steps=1, strength=0.5, key=KEY)
    changed = (context != clean).flatten(1).any(dim=1)
    assert 0 < int(changed.sum()) < 16
    assert torch.equal(context[:, -1], clean[:, -1])
    from acdit import draws

    level = 0.5 * draws.uniform((), stream="self_context_level", **KEY)
    noise = draws.normal(tuple(clean.shape[1:]), stream="self_context_noise", **KEY).double()
    assert torch.equal(changed, draws.uniform((), stream="self_context", **KEY) < 0.5)
    timestep = (1000 * level).long()
    alpha = corruption.scheduler.alphas_cumprod.double()[timestep][:, None, None]
    cache = model.new_cache(16)
    with torch.no_grad():
        for block in range(3):
            noisy = alpha.sqrt() * clean[:, block] + (1 - alpha).sqrt() * noise[:, block]
            made = alpha.sqrt() * noisy - (1 - alpha).sqrt() * model.denoise(noisy, timestep, labels, cache)
            expected = torch.where(changed[:, None, None], made, clean[:, block])
            torch.testing.assert_close(context[:, block], expected, rtol=0, atol=1e-5)
            model.prefill(context[:, block : block + 1], cache)


def batches(rank: int, world: int, **options: Any) -> Batch:
    return next(iter(Batches(build(tiny_recipe(**options)), rank, world, 0, torch.device("cpu"))))[0]


def test_two_processes_make_the_context_of_one() -> None:
    options = {"corruption__self_context": 0.7, "optim__batch_size": 8}
    whole = batches(0, 1, **options)
    parts = [batches(rank, 2, **options).context for rank in range(2)]
    torch.testing.assert_close(torch.cat(parts), whole.context, rtol=0, atol=1e-6)
    plain = batches(0, 1, optim__batch_size=8)
    for name in ("clean", "noise", "timestep", "labels"):  # everything else is drawn as without it
        assert torch.equal(getattr(plain, name), getattr(whole, name))


def test_a_run_with_it_resumes_to_the_bit(tmp_path: Path) -> None:
    recipe = tiny_recipe(corruption__self_context=0.5, corruption__copies=2)
    expected = state_hash(run(recipe, tmp_path / "whole"))
    run(tiny_recipe(corruption__self_context=0.5, corruption__copies=2), tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    resumed = Trainer(recipe, tmp_path / "cut", resume="checkpoint-2", progress=False)
    resumed.train()
    assert state_hash(resumed) == expected
    assert state_hash(run(tiny_recipe(corruption__copies=2), tmp_path / "plain")) != expected


def test_what_does_not_go_together_is_refused() -> None:
    for options in ({"corruption__context_noise": 0.5}, {"train__parallel": "fsdp2"}):
        with pytest.raises(ConfigError, match=r"corruption\.self_context"):
            tiny_recipe(corruption__self_context=0.5, **options)
