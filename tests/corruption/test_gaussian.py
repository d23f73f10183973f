"""Gaussian corruption equals diffusers', block by block."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError

B, K, N, L, D = 2, 3, 4, 5, 6


def draw(copies: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (B, K, N, L, D) if copies else (B, N, L, D)
    clean = torch.randn((B, 1, N, L, D) if copies else shape, dtype=torch.float64)
    return clean, torch.randn(shape, dtype=torch.float64), torch.randint(0, 1000, shape[:-2])


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_each_block_is_corrupted_as_diffusers_does_it(prediction_type: str, copies: bool) -> None:
    corruption = GaussianCorruption(prediction_type)
    scheduler = DDPMScheduler()
    clean, noise, timestep = draw(copies)
    noisy, target = corruption.corrupt(clean, noise, timestep), corruption.target(clean, noise, timestep)
    for where in torch.cartesian_prod(*(torch.arange(size) for size in timestep.shape)):
        index = tuple(where.tolist())
        own_clean = clean.expand_as(noise)[index][None]
        t = timestep[index][None]
        assert torch.equal(noisy[index], scheduler.add_noise(own_clean, noise[index][None], t)[0])
        if prediction_type == "epsilon":
            assert torch.equal(target[index], noise[index])
        else:
            assert torch.equal(target[index], scheduler.get_velocity(own_clean, noise[index][None], t)[0])


def test_flow_is_diffusers_flow_matching() -> None:
    corruption = GaussianCorruption("flow_prediction")
    clean, noise, _ = draw(copies=False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    timestep = scheduler.timesteps[torch.randint(0, 1000, (B, N))]
    expected = scheduler.scale_noise(clean.flatten(0, 1), timestep.flatten(), noise.flatten(0, 1)).reshape(clean.shape)
    torch.testing.assert_close(corruption.corrupt(clean, noise, timestep), expected, rtol=0, atol=1e-6)
    assert torch.equal(corruption.target(clean, noise, timestep), noise - clean)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_one_solver_step_with_the_true_target_recovers_the_clean_data(prediction_type: str) -> None:
    """Target, corruption and the sampling scheduler speak of the same thing."""
    corruption = GaussianCorruption(prediction_type)
    scheduler = corruption.sampling_scheduler()
    scheduler.set_timesteps(1)
    clean, noise, _ = draw(copies=False)
    t = scheduler.timesteps[0]
    timestep = t.expand(B, N)
    noisy = corruption.corrupt(clean, noise, timestep)
    out = scheduler.step(corruption.target(clean, noise, timestep), t, noisy).prev_sample
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-4)


def test_the_sampling_scheduler_is_the_papers() -> None:
    ours = GaussianCorruption().sampling_scheduler()
    reference = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    ours.set_timesteps(25)
    reference.set_timesteps(25)
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert ours.timesteps.tolist() == torch.linspace(0, 999, 26).round().int().tolist()[::-1][:-1]
    noisy, ours_out, reference_out = torch.randn(2, 3), None, None
    for t in ours.timesteps:
        ours_out = ours.step(
            noisy if ours_out is None else ours_out * 0.9, t, noisy if ours_out is None else ours_out
        ).prev_sample
        reference_out = reference.step(
            noisy if reference_out is None else reference_out * 0.9,
            t,
            noisy if reference_out is None else reference_out,
        ).prev_sample
        assert torch.equal(ours_out, reference_out)


def test_timesteps_are_uniform_over_the_schedule() -> None:
    u = torch.arange(4000, dtype=torch.float64) / 4000
    counts = torch.bincount(GaussianCorruption().timesteps(u), minlength=1000)
    assert counts.tolist() == [4] * 1000
    flow = GaussianCorruption("flow_prediction").timesteps(u)
    assert flow.is_floating_point()
    assert flow.max() < 1000


def test_logit_normal_timesteps_have_the_distribution_they_are_named_for() -> None:
    corruption = GaussianCorruption("flow_prediction", timestep_draw="logit_normal", logit_mean=-0.5, logit_std=1.2)
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(corruption.timesteps(u).double() / 1000)
    assert abs(logits.mean() + 0.5) < 1e-3
    assert abs(logits.std() - 1.2) < 1e-2
    edge = GaussianCorruption(timestep_draw="logit_normal").timesteps(
        torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    )
    assert edge.tolist() == [0, 999]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_min_snr_weights_the_error_of_the_clean_data(prediction_type: str) -> None:
    """loss = min(SNR, γ) · mean (clean − clean implied by the prediction)²."""
    gamma = 5.0
    corruption = GaussianCorruption(prediction_type, min_snr_gamma=gamma)
    clean, noise, timestep = draw(copies=False)
    timestep = timestep.clamp(min=1)
    noisy = corruption.corrupt(clean, noise, timestep)
    prediction = corruption.target(clean, noise, timestep) + 0.1 * torch.randn_like(noise)
    if prediction_type == "flow_prediction":
        sigma = (timestep / 1000.0).double()[..., None, None]
        snr, implied = ((1 - sigma) / sigma) ** 2, noisy - sigma * prediction
    else:
        alpha = DDPMScheduler().alphas_cumprod.double()[timestep][..., None, None]
        snr = alpha / (1 - alpha)
        if prediction_type == "epsilon":
            implied = (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        else:
            implied = alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
    expected = (snr.clamp(max=gamma) * (clean - implied).square()).mean(dim=(-2, -1))
    torch.testing.assert_close(
        corruption.loss_per_block(prediction, clean, noise, timestep), expected, rtol=1e-4, atol=1e-7
    )


def test_loss_is_the_mean_square_over_everything() -> None:
    clean, noise, timestep = draw()
    prediction = torch.randn_like(noise)
    corruption = GaussianCorruption()
    torch.testing.assert_close(
        corruption.loss(prediction, clean, noise, timestep), (prediction - noise).square().mean()
    )
    assert corruption.loss_per_block(prediction, clean, noise, timestep).shape == (B, K, N)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="flow_prediction"):
        GaussianCorruption("flow")
    with pytest.raises(ConfigError, match="logit_normal"):
        GaussianCorruption(timestep_draw="cosine")
