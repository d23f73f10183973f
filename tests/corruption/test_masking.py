"""Masking: what is masked how often, what it costs, and that both estimators are the bound."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch

from acdit import draws
from acdit.corruption import MaskingCorruption
from acdit.corruption.masking import LOWEST_RATE, TIMESTEPS, candidate_ranges, range_variances
from acdit.errors import ConfigError
from tests.texts import VOCAB, exact_bound, text_model

MASK = VOCAB


def grid_of_u(count: int) -> torch.Tensor:
    """Midpoints of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_rates_fill_their_range_and_counts_are_uniform() -> None:
    u = grid_of_u(1200)[:, None]
    rate = MaskingCorruption(4, MASK).timesteps(u) / TIMESTEPS
    assert rate.dtype == torch.float64
    torch.testing.assert_close(rate.sort(0).values, LOWEST_RATE + (1 - LOWEST_RATE) * u, rtol=0, atol=1e-12)
    clipped = MaskingCorruption(4, MASK, mask_range=(0.3, 0.8)).timesteps(u) / TIMESTEPS
    assert clipped.min() > 0.3
    assert clipped.max() < 0.8
    counts = MaskingCorruption(4, MASK, "count").timesteps(u) / TIMESTEPS * 4
    assert [int((counts == m).sum()) for m in (1, 2, 3, 4)] == [300] * 4
    some = MaskingCorruption(4, MASK, "count", (0.3, 0.8)).timesteps(u) / TIMESTEPS * 4
    assert [int((some == m).sum()) for m in (1, 2, 3, 4)] == [0, 600, 600, 0]
    assert MaskingCorruption(10, MASK, "count", (0.3, 0.7))._counts(10, (0.3, 0.7)) == (3, 5)


@pytest.mark.parametrize("draw", ["rate", "count"])
def test_a_block_of_one_token_is_always_masked_with_weight_one(draw: str) -> None:
    corruption = MaskingCorruption(1, MASK, draw)
    u, noise = torch.rand(5, 2, 7).double(), torch.rand(5, 2, 7, 1).double()
    timestep = corruption.timesteps(u)
    assert torch.equal(corruption.rate(timestep), torch.ones(5, 2, 7).double())
    assert corruption.corrupt(torch.zeros(5, 1, 7, 1).long(), noise, timestep).eq(MASK).all()


def test_exactly_the_drawn_count_is_masked_and_every_set_is_as_likely() -> None:
    corruption = MaskingCorruption(4, MASK, "count")
    noise = torch.rand(20000, 1, 4).double()
    masked = corruption.masked(noise, torch.full((20000, 1), 0.5 * TIMESTEPS))
    assert (masked.sum(-1) == 2).all()
    sets = (masked.long() * torch.tensor([1, 2, 4, 8])).sum(-1).unique(return_counts=True)[1]
    assert len(sets) == comb(4, 2)
    assert ((sets - 20000 / 6).abs() < 5 * (20000 * 5 / 36) ** 0.5).all()


def test_a_known_first_token_is_never_masked_and_does_not_count() -> None:
    for draw, length in itertools.product(("rate", "count"), (1, 3)):
        corruption = MaskingCorruption(length, MASK, draw, first_token_given=True)
        noise = torch.rand(500, 2, length).double()
        timestep = corruption.timesteps(torch.rand(500, 2))
        masked = corruption.masked(noise, timestep)
        assert not masked[:, 0, 0].any()
        if draw == "count":
            free = torch.tensor([length - 1, length])
            assert torch.equal(masked.sum(-1), (corruption.rate(timestep) * free).round().long())
            assert masked[:, 1].any(-1).all()
        if length == 1:
            assert masked[:, 1].all()
        logits = torch.zeros(500, 2, length, VOCAB).double()  # every masked token costs log V
        loss = corruption.loss(logits, torch.zeros(500, 2, length).long(), noise, timestep)
        tolerance = 1e-12 if draw == "count" or length == 1 else 0.3
        assert abs(float(loss) - torch.tensor(VOCAB).double().log()) < tolerance


def test_subs_copies_what_is_known_and_never_predicts_the_mask() -> None:
    corruption = MaskingCorruption(3, MASK)
    logits, noisy = torch.randn(2, 3, VOCAB), torch.tensor([[0, MASK, 2], [MASK, MASK, 1]])
    log_p = corruption.log_probabilities(logits.bfloat16(), noisy)
    assert log_p.dtype == torch.float32
    assert log_p.shape == (2, 3, VOCAB)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 3))
    assert log_p[0, 0].tolist() == [0.0, -torch.inf, -torch.inf]
    assert torch.equal(log_p[0, 1], logits[0, 1].bfloat16().float().log_softmax(-1))


def test_the_loss_is_the_weighted_entropy_of_masked_tokens_alone() -> None:
    corruption = MaskingCorruption(2, MASK)
    clean, noise = torch.tensor([[[[1, 2]]]]), torch.tensor([[[[0.1, 0.9]], [[0.3, 0.2]]]]).double()
    timestep = torch.tensor([[[0.25], [0.5]]]).double() * TIMESTEPS
    logits = torch.randn(1, 2, 1, 2, VOCAB)
    noisy = corruption.corrupt(clean, noise, timestep)
    assert noisy.tolist() == [[[[MASK, 2]], [[MASK, MASK]]]]
    nll = -logits.log_softmax(-1)
    expected = [nll[0, 0, 0, 0, 1] / 0.25 / 2, (nll[0, 1, 0, 0, 1] + nll[0, 1, 0, 1, 2]) / 0.5 / 2]
    found = corruption.loss_per_block(logits, clean, noise, timestep)
    torch.testing.assert_close(found.flatten(), torch.stack(expected))
    torch.testing.assert_close(corruption.loss(logits, clean, noise, timestep), torch.stack(expected).mean())
    half = corruption.loss(logits.bfloat16(), clean, noise, timestep)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("draw", ["rate", "count"])
def test_the_expectation_of_the_loss_is_the_enumerated_bound(draw: str) -> None:
    """No sampling: every mask at its probability, t by quadrature that is exact for polynomials."""
    model, length = text_model(6, 3), 3
    clean = torch.tensor([[[0, 2, 1], [1, 1, 0]]])
    corruption = MaskingCorruption(length, MASK, draw)
    if draw == "count":
        levels = [(m / length, 1 / length) for m in (1, 2, 3)]
        expected = exact_bound(model, clean)
    else:
        half = (1 - LOWEST_RATE) / 2
        nodes, weights = (
            torch.tensor([-(0.6**0.5), 0, 0.6**0.5], dtype=torch.float64),
            torch.tensor([5, 8, 5]).double() / 18,
        )
        levels = list(zip((LOWEST_RATE + half * (1 + nodes)).tolist(), weights.tolist(), strict=True))
        expected = exact_bound(model, clean, LOWEST_RATE, 1.0)
    found = torch.zeros(1, 2, 3).double()
    for (t, weight), mask in itertools.product(levels, itertools.product((False, True), repeat=3)):
        m = sum(mask)
        if draw == "count" and m != round(t * 3):
            continue
        chance = 1 / comb(3, m) if draw == "count" else t**m * (1 - t) ** (3 - m)
        # Noise that masks exactly these tokens under either rule.
        noise = torch.where(torch.tensor(mask), 1e-4, 1 - 1e-6).double() + torch.arange(3) * 1e-8
        noise, timestep = noise.expand(1, 2, 3), torch.full((1, 2), t * TIMESTEPS, dtype=torch.float64)
        noisy = corruption.corrupt(clean, noise, timestep)
        assert torch.equal((noisy == MASK)[0, 0], torch.tensor(mask))
        with torch.no_grad():
            logits = model(clean, noisy, timestep).sample
        found += weight * chance * corruption.token_losses(logits, clean, noise, timestep)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_what_cannot_be_is_refused() -> None:
    for options in (
        {"draw": "some"}, {"mask_range": (0.5, 0.5)}, {"mask_range": (-0.1, 0.5)}, {"mask_range": (0.5, 1.1)},
        {"draw": "count", "mask_range": (0.3, 0.4)}, {"mask_range": (0.0, 1e-3)},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="corruption"):
            MaskingCorruption(4, MASK, **options)
    with pytest.raises(ConfigError, match="always masked"):
        MaskingCorruption(1, MASK, mask_range=(0.3, 0.8))


def test_variance_by_range_is_that_of_the_losses_inside() -> None:
    ranges = candidate_ranges()
    assert ranges[0] == (0.0, 0.5)
    assert ranges[-1] == (0.5, 1.0)
    assert len(ranges) == 11
    t = torch.tensor([0.1, 0.2, 0.45, 0.7, 0.9])
    losses = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.5])
    found = range_variances(t, losses, [(0.0, 0.5), (0.4, 0.9), (0.95, 1.0)])
    assert found[0.0, 0.5] == pytest.approx(float(losses[:3].var()))
    assert found[0.4, 0.9] == pytest.approx(float(losses[2:].var()))
    assert found[0.95, 1.0] == float("inf")


def test_low_discrepancy_draws_lie_one_in_each_part_whoever_draws_them() -> None:
    options = {"seed": 3, "stream": "timestep", "step": 5, "batch_size": 6, "copies": 2}
    whole = draws.low_discrepancy(4, samples=range(6), **options)
    assert whole.shape == (6, 2, 4)
    assert (whole.flatten() * 48).floor().sort().values.tolist() == list(range(48))
    parts = [draws.low_discrepancy(4, samples=rows, **options) for rows in (range(2), range(2, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(draws.low_discrepancy(4, samples=range(6), **{**options, "step": 6}), whole)


def test_low_discrepancy_draws_know_nothing_of_position() -> None:
    many = torch.stack(
        [
            draws.low_discrepancy(8, seed=1, stream="t", step=step, samples=range(4), batch_size=4)[:, 0]
            for step in range(600)
        ]
    )
    sd = (1 / 12) ** 0.5
    assert ((many.mean(0) - 0.5).abs() < 4.5 * sd / 600**0.5).all()
    assert ((many.var(0) - 1 / 12).abs() < 0.015).all()
    places = torch.arange(32).double()
    flat = many.flatten(1)
    correlation = torch.stack([torch.corrcoef(torch.stack([row, places]))[0, 1] for row in flat])
    assert correlation.mean().abs() < 4.5 / (31 * 600) ** 0.5
