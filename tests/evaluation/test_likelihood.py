"""The bound of continuous data: against distributions written out, and against a likelihood that is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from acdit import ACDiTTransformer
from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.evaluation.likelihood import BoundTerms, EightBit, gaussian_bound, loss_over_timesteps
from tests.conftest import tiny_model

LN2 = math.log(2)


def schedule(timesteps: int, prediction_type: str = "epsilon") -> GaussianCorruption:
    """A linear schedule that ends in noise however many steps it has."""
    return GaussianCorruption(prediction_type, timesteps, beta_start=0.1 / timesteps, beta_end=min(0.9, 20 / timesteps))


def small_model(**options: Any) -> ACDiTTransformer:
    return tiny_model(grid=(4, 4), block=(2, 2), num_layers=1, num_attention_heads=1, **options)


# --- every term against torch.distributions, in fp64 ----------------------------------------------------------------


def brute_force(
    corruption: GaussianCorruption, variance: str, clean: Tensor, noisy: Tensor, found: Tensor, t: int, bins: bool
) -> float:
    """Nats of one block at one step, from q(x_t | x_{t−1}) and Bayes' rule for every number by itself."""
    alphas = [1.0, *corruption.scheduler.alphas_cumprod.double().tolist()]  # shifted: alphas[t + 1] is of step t
    total = 0.0

    def posterior(x0: float, xt: float) -> Normal:
        # x_{t−1} | x_0 is Normal(√ᾱ x_0, 1 − ᾱ); x_t | x_{t−1} is Normal(√(1 − β) x_{t−1}, β): add the precisions.
        before, beta = alphas[t], 1 - alphas[t + 1] / alphas[t]
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * xt / beta) / precision
        return Normal(torch.tensor(mean, dtype=torch.float64), precision**-0.5)

    beta_1 = 1 - alphas[2] / alphas[1]
    decoder = math.sqrt(1 / (1 / (1 - alphas[1]) + (1 - beta_1) / beta_1) if bins else 1 - alphas[1])
    for x0, xt, guess in zip(clean.flatten().tolist(), noisy.flatten().tolist(), found.flatten().tolist(), strict=True):
        if t > 0:
            q, p = posterior(x0, xt), posterior(guess, xt)
            if variance == "large":
                p = Normal(p.loc, math.sqrt(1 - alphas[t + 1] / alphas[t]))
            total += float(kl_divergence(q, p))
        elif bins:
            p = Normal(torch.tensor(guess, dtype=torch.float64), decoder)
            value = round((x0 + 1) * 127.5)
            low = 0.0 if value == 0 else float(p.cdf(torch.tensor((value - 0.5) / 127.5 - 1, dtype=torch.float64)))
            high = 1.0 if value == 255 else float(p.cdf(torch.tensor((value + 0.5) / 127.5 - 1, dtype=torch.float64)))
            total -= math.log(high - low)
        else:
            total -= float(
                Normal(torch.tensor(guess, dtype=torch.float64), decoder).log_prob(
                    torch.tensor(x0, dtype=torch.float64)
                )
            )
    return total


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("bins", [False, True])
def test_every_term_is_the_divergence_of_the_distributions(prediction_type: str, variance: str, bins: bool) -> None:
    corruption = GaussianCorruption(prediction_type, 5, beta_start=0.02, beta_end=0.5)
    terms = BoundTerms(corruption, variance, EightBit() if bins else None)
    clean = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    if bins:
        clean = torch.randint(0, 256, clean.shape).double() / 127.5 - 1
        clean[0, 0, 0, 0], clean[0, 0, 0, 1] = -1.0, 1.0  # the open bins
    noise, wrong = torch.randn_like(clean), 0.05 * torch.randn_like(clean)
    timestep = torch.arange(5)[:, None]
    noisy = corruption.corrupt(clean, noise, timestep)
    prediction = corruption.target(clean, noise, timestep) + wrong
    found = corruption.split(noisy, prediction, timestep)[0]
    nats = terms.steps(clean, noisy, prediction, timestep)
    for t in range(5):
        expected = brute_force(corruption, variance, clean[t], noisy[t], found[t], t, bins)
        assert float(nats[t, 0]) == pytest.approx(expected, rel=1e-9), t
    alpha = float(corruption.scheduler.alphas_cumprod[-1].double())
    ends = Normal(math.sqrt(alpha) * clean, math.sqrt(1 - alpha))
    expected_prior = kl_divergence(ends, Normal(torch.zeros_like(clean), 1.0)).sum((-2, -1))
    torch.testing.assert_close(terms.prior(clean), expected_prior, rtol=1e-9, atol=0)


def test_the_values_of_a_pixel_share_all_of_its_probability() -> None:
    terms = BoundTerms(schedule(50), pixels=EightBit(0.3, 0.4))
    values = (torch.arange(256, dtype=torch.float64) / 255 - 0.3) / 0.4
    for mean in (-3.0, -0.75, 0.1234, 1.75, 40.0):
        nats = terms._decoder(values, torch.full_like(values, mean))
        assert float((-nats).exp().sum()) == pytest.approx(1.0, abs=1e-9)
        assert bool(torch.isfinite(nats).all())


# --- data whose likelihood is known: Gaussian, with the best predictor there is ---------------------------------------


class Optimal(ACDiTTransformer):
    """Predicts the noise of blocks x_i = ρ·x_{i−1} + √(1 − ρ²)·z, the first N(0, 1): the conditional mean given the
    noisy block and the clean one before it. `wrong` spoils it."""

    def prepare(self, corruption: GaussianCorruption, rho: float, wrong: float = 0.0) -> Optimal:
        self.corruption, self.rho, self.wrong = corruption, rho, wrong
        return self.double()

    def forward(
        self, clean: Tensor, noisy: Tensor, timestep: Tensor, labels: Any = None, return_dict: Any = None
    ) -> Any:
        before = torch.cat([torch.zeros_like(clean[:, :1]), self.rho * clean[:, :-1]], dim=1)[:, None]
        variance = torch.full((clean.shape[1], 1, 1), 1 - self.rho**2).double()
        variance[0] = 1.0
        alpha = self.corruption.scheduler.alphas_cumprod.double()[timestep][..., None, None]
        gain = alpha.sqrt() * variance / (alpha * variance + 1 - alpha)
        best = before + gain * (noisy - alpha.sqrt() * before) + self.wrong
        return ((noisy - alpha.sqrt() * best) / (1 - alpha).sqrt(),)


RHO = 0.8


def known_case(
    timesteps: int, samples: int = 400, wrong: float = 0.0
) -> tuple[Optimal, GaussianCorruption, Tensor, list[float]]:
    """Model, corruption, data and the data's own −log p of each block, in bits a dimension."""
    corruption = schedule(timesteps)
    model = Optimal(grid=(3,), block=(1,), in_channels=2, num_layers=1, num_attention_heads=1, attention_head_dim=4)
    z = torch.randn(samples, 3, 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = [z[:, 0]]
    for block in (1, 2):
        x.append(RHO * x[-1] + math.sqrt(1 - RHO**2) * z[:, block])
    clean = torch.stack(x, dim=1)
    exact = []
    for block in range(3):
        p = Normal(torch.zeros_like(x[0]), 1.0) if block == 0 else Normal(RHO * x[block - 1], math.sqrt(1 - RHO**2))
        exact.append(float(-p.log_prob(x[block]).mean()) / LN2)
    return model.prepare(corruption, RHO, wrong), corruption, clean, exact


def test_the_bound_lies_above_a_known_likelihood_and_closes_as_steps_grow() -> None:
    gaps, noises = [], []
    for timesteps in (5, 20, 300):
        model, corruption, clean, exact = known_case(timesteps, samples=2000)
        found = gaussian_bound(model, BoundTerms(corruption), [(clean, None)], num_timesteps=None, num_draws=2)
        for block, bits in zip(found.by_block, exact, strict=True):
            assert block.bits_per_dim - bits > -1.5 * (block.interval[1] - block.bits_per_dim)
        gaps.append(found.bits_per_dim - sum(exact) / 3)
        noises.append(found.interval[1] - found.bits_per_dim)
    assert gaps[0] > gaps[1] + noises[1] > noises[1]
    assert gaps[2] == pytest.approx(0, abs=0.03)
    assert max(noises) < 0.025


def test_under_small_variances_the_gap_is_what_the_schedule_says() -> None:
    """½(ΔSNR·mmse − log of what the step tells), summed: it stays however many the steps, half of Euler's constant and
    more, because the first steps' signal-to-noise ratios are as 1 : ½ : ⅓ … at best."""
    model, corruption, clean, exact = known_case(1000, samples=1000)
    found = gaussian_bound(model, BoundTerms(corruption, "small"), [(clean, None)], num_timesteps=50, num_draws=4)
    alpha = corruption.scheduler.alphas_cumprod.double()
    for block, bound in enumerate(found.by_block):
        told = alpha / (1 - alpha) * (1.0 if block == 0 else 1 - RHO**2)  # of the block, given the one before
        gap = 0.5 * ((told[:-1] - told[1:]) / (1 + told[1:]) - torch.log((1 + told[:-1]) / (1 + told[1:]))).sum()
        assert gap > 0.5772 / 2
        assert bound.bits_per_dim - exact[block] == pytest.approx(float(gap) / LN2, abs=0.06)


def test_blocks_after_the_first_are_cheaper_by_what_the_block_before_tells() -> None:
    model, corruption, clean, _ = known_case(1000)
    found = gaussian_bound(model, BoundTerms(corruption), [(clean, None)], num_timesteps=24)
    told = -0.5 * math.log2(1 - RHO**2)  # the mutual information of neighbours, in bits
    first, *later = (block.bits_per_dim for block in found.by_block)
    for bits in later:
        assert first - bits == pytest.approx(told, abs=0.1)


def test_a_worse_predictor_costs_what_its_error_costs() -> None:
    """Off by δ everywhere: δ²/2 times the precision of every step, the decoder's with them."""
    delta = 0.05
    results = []
    for wrong in (0.0, delta):
        model, corruption, clean, _ = known_case(100, wrong=wrong)
        results.append(gaussian_bound(model, BoundTerms(corruption), [(clean, None)], num_timesteps=None, num_draws=8))
    terms = BoundTerms(corruption)
    cost = (terms.of_clean[1:].square() / terms.model_variance[1:]).sum() + 1 / terms.decoder_variance
    assert results[1].bits_per_dim - results[0].bits_per_dim == pytest.approx(float(cost) * delta**2 / 2 / LN2, rel=0.1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_few_timesteps_estimate_the_sum_over_all(variance: str) -> None:
    model, corruption, clean, _ = known_case(200)
    terms = BoundTerms(corruption, variance)
    whole = gaussian_bound(model, terms, [(clean, None)], num_timesteps=None, num_draws=2)
    few = gaussian_bound(model, terms, [(clean[:200], None), (clean[200:], None)], num_timesteps=6, num_draws=8, seed=1)
    for one, other in ((whole, few), *zip(whole.by_block, few.by_block, strict=True)):
        noise = sum((found.interval[1] - found.bits_per_dim) ** 2 for found in (one, other)) ** 0.5
        assert abs(one.bits_per_dim - other.bits_per_dim) < 1.7 * noise
        assert noise < 0.25
    assert few.bits_per_dim == pytest.approx(few.prior + few.diffusion + few.decoder)
    assert few.bits_per_dim == pytest.approx(sum(block.bits_per_dim for block in few.by_block) / 3)
    assert "7 of 200 steps" in few.protocol


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    model, corruption, clean, _ = known_case(50, samples=20)
    terms = BoundTerms(corruption)
    truth = gaussian_bound(model, terms, [(clean, None)], num_timesteps=None, num_draws=200, seed=999).bits_per_dim
    hits = 0
    for seed in range(60):
        low, high = gaussian_bound(model, terms, [(clean, None)], num_timesteps=4, num_draws=8, seed=seed).interval
        hits += low <= truth <= high
    assert hits >= 50


# --- the model itself ---


def data_of(model: ACDiTTransformer, count: int = 6) -> tuple[Tensor, Tensor]:
    layout = model.layout
    clean = torch.randn(count, layout.num_blocks, layout.block_tokens, model.token_dim, dtype=torch.float64)
    return clean, torch.arange(count) % 5


def test_one_pass_is_the_sum_over_blocks_drawn_one_by_one() -> None:
    """Against denoise and a cache, as sampling goes, with the draws of the estimator."""
    from acdit import draws

    model, corruption = small_model(), schedule(4)
    clean, labels = data_of(model, 2)
    terms = BoundTerms(corruption)
    found = gaussian_bound(model, terms, [(clean, labels)], num_timesteps=None, num_draws=1, seed=7)
    key: dict[str, Any] = {"seed": 7, "step": 0, "samples": range(2), "copies": 4}
    noise = draws.normal(tuple(clean.shape[1:]), stream="bound_noise_0", **key).double()
    cache = model.new_cache(2)
    for block in range(4):
        nats = terms.prior(clean[:, block])
        for copy, t in enumerate([0, 1, 2, 3]):
            at = torch.full((2,), t)
            noisy = corruption.corrupt(clean[:, block], noise[:, copy, block], at)
            with torch.no_grad():
                prediction = model.denoise(noisy, at, labels, cache)
            nats = nats + terms.steps(clean[:, block], noisy, prediction, at)
        size = clean.shape[2] * clean.shape[3]
        assert found.by_block[block].bits_per_dim == pytest.approx(float(nats.mean()) / LN2 / size, rel=1e-9)
        if block < 3:
            model.prefill(clean[:, block : block + 1], cache)
    assert math.isinf(found.interval[1])


def test_labels_matter_and_draws_are_keyed_by_sample() -> None:
    model, terms = small_model(), BoundTerms(schedule(10))
    clean, labels = data_of(model)
    together = gaussian_bound(model, terms, [(clean, labels)])
    apart = gaussian_bound(model, terms, [(clean[:2], labels[:2]), (clean[2:], labels[2:])])
    assert apart.bits_per_dim == pytest.approx(together.bits_per_dim, rel=1e-12)
    unlabelled = gaussian_bound(model, terms, [(clean, None)])
    null = gaussian_bound(model, terms, [(clean, torch.full((6,), 5))])
    assert unlabelled.bits_per_dim == null.bits_per_dim != together.bits_per_dim
    assert "given the labels" in together.protocol
    assert "no label" in unlabelled.protocol


def test_clipping_helps_a_predictor_that_leaves_the_range() -> None:
    model, corruption = small_model(), schedule(10)
    clean = torch.randint(0, 256, data_of(model)[0].shape).double() / 127.5 - 1
    loose, clipped = (
        gaussian_bound(model, BoundTerms(corruption, pixels=EightBit(), clip=clip), [(clean, None)])
        for clip in (False, True)
    )
    assert clipped.bits_per_dim < loose.bits_per_dim


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_the_loss_over_timesteps_is_the_trainings(prediction_type: str) -> None:
    model, corruption = small_model(), GaussianCorruption(prediction_type)
    clean, labels = data_of(model)
    timesteps = (
        torch.tensor([3, 250, 999]) if prediction_type != "flow_prediction" else torch.tensor([3.5, 250.0, 999.0])
    )
    mean, error = loss_over_timesteps(model, corruption, [(clean[:4], labels[:4]), (clean[4:], labels[4:])], timesteps)
    from acdit import draws

    noise = draws.normal(tuple(clean.shape[1:]), seed=0, stream="loss_noise", step=0, samples=range(6), copies=3)
    for place, t in enumerate(timesteps):
        at, own = t.expand(6, 4), noise[:, place].double()
        with torch.no_grad():
            (prediction,) = model(clean, corruption.corrupt(clean, own, at), at, labels, return_dict=False)
        expected = corruption.loss_per_block(prediction, clean, own, at)
        torch.testing.assert_close(mean[place], expected.mean(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(error[place], expected.std(0) / 6**0.5, rtol=1e-6, atol=1e-12)


def test_what_cannot_be_measured_is_refused() -> None:
    corruption = schedule(10)
    with pytest.raises(ConfigError, match="flow"):
        BoundTerms(GaussianCorruption("flow_prediction"))
    with pytest.raises(ConfigError, match="variance"):
        BoundTerms(corruption, "learned")
    with pytest.raises(ConfigError, match="clip"):
        BoundTerms(corruption, clip=True)
    model, terms = small_model(), BoundTerms(corruption)
    with pytest.raises(DataError, match="no sample"):
        gaussian_bound(model, terms, [])
    with pytest.raises(DataError, match="no sample"):
        loss_over_timesteps(model, corruption, [], torch.tensor([1]))
    with pytest.raises(ConfigError, match="draws"):
        gaussian_bound(model, terms, [data_of(model)], num_draws=0)
    text = tiny_model(grid=(4,), block=(2,), vocab_size=3, in_channels=4, num_classes=None)
    with pytest.raises(ConfigError, match="a model of text"):
        gaussian_bound(text, terms, [])
    with torch.no_grad():
        model.final_layer.linear.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="sample 0"):
        gaussian_bound(model, terms, [data_of(model)])
