"""Learning-rate schedules and moving averages against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from acdit.recipe import EMARecipe, OptimRecipe
from acdit.training.ema import EMAWeights
from acdit.training.lr_schedules import lr_factor, make_lr_scheduler


def test_wsd_warms_up_stays_and_halves_six_times() -> None:
    optim = OptimRecipe(batch_size=1, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    factors = [lr_factor(optim, 1000, step) for step in range(1001)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == factors[799] == factors[800] == 1.0
    assert factors[900] == pytest.approx(0.5**3)
    assert factors[1000] == pytest.approx(0.5**6)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_cosine_and_constant() -> None:
    cosine = OptimRecipe(batch_size=1, schedule="cosine", warmup_steps=0)
    assert lr_factor(cosine, 100, 0) == 1.0
    assert lr_factor(cosine, 100, 50) == pytest.approx(0.01 + 0.99 * 0.5)
    assert lr_factor(cosine, 100, 100) == pytest.approx(0.01)
    assert lr_factor(cosine, 100, 25) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4)))
    constant = OptimRecipe(batch_size=1, schedule="constant", warmup_steps=4)
    assert [lr_factor(constant, 100, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_the_optimizer_gets_the_factor() -> None:
    optim = OptimRecipe(batch_size=1, lr=0.5, schedule="wsd", decay_fraction=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make_lr_scheduler(optimizer, optim, 10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == 0.5 * lr_factor(optim, 10, step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [True, False])
def test_averages_follow_their_definition(warmup: bool) -> None:
    model = nn.Linear(3, 2)
    recipe = EMARecipe(decays=[0.9, 0.5], warmup=warmup, inv_gamma=1.0, power=0.75)
    ema = EMAWeights(model, recipe)
    naive = [{name: p.detach().clone() for name, p in model.named_parameters()} for _ in recipe.decays]
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.step(model)
        for average, decay in zip(naive, recipe.decays, strict=True):
            done = step - 1
            ramp = 1 - (1 + done) ** -0.75 if warmup else 1.0
            now = min(decay, ramp) if done else 0.0
            for name, parameter in model.named_parameters():
                average[name] = now * average[name] + (1 - now) * parameter.detach()
    for index, average in enumerate(naive):
        for name, value in ema.weights(index).items():
            torch.testing.assert_close(value, average[name])
    assert ema.counters == [7, 7]
