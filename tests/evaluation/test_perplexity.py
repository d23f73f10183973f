"""The bound of text: against enumeration, and exact with one token a block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.evaluation.perplexity import text_bound
from acdit.processes import Processes
from tests.texts import VOCAB, exact_bound, text_model


def sequences(count: int, tokens: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("draw", ["rate", "count"])
def test_the_average_over_draws_is_the_enumerated_bound(draw: str) -> None:
    model, text = text_model(6, 3), sequences(3)
    exact = exact_bound(model, text.reshape(3, 2, 3), *((1e-3, 1.0) if draw == "rate" else ()))
    found = text_bound(model, text.split([2, 1]), draw=draw, num_draws=400, copies=100)
    low, high = found.interval
    wide = (high - low) / 2
    assert wide < 0.1
    assert abs(found.nats_per_token - float(exact.mean())) < 1.5 * wide
    assert found.nats_per_token == pytest.approx((low + high) / 2)
    for parts, over in ((found.by_block, (0, 2)), (found.by_position, (0, 1))):
        torch.testing.assert_close(torch.tensor(parts).double(), exact.mean(over), rtol=0, atol=0.15)
        assert sum(parts) / len(parts) == pytest.approx(found.nats_per_token)
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))
    assert found.tokens == 18
    assert ("but for the cut" in found.protocol) == (draw == "rate")


def test_the_interval_holds_the_bound_as_often_as_it_says() -> None:
    """Of 60 evaluations with few draws; the even filling makes it a little too wide, never too narrow."""
    model, text = text_model(4, 2), sequences(4, 4)
    exact = float(exact_bound(model, text.reshape(4, 2, 2)).mean())
    intervals = [text_bound(model, [text], num_draws=6, seed=seed).interval for seed in range(60)]
    held = sum(low <= exact <= high for low, high in intervals)
    assert held >= 51


class Peers(Processes):
    """One of several processes, after the other; what the others gathered is known."""

    def gather(self, value: Any) -> list[Any]:
        told.append(value)
        return told


told: list[Any] = []


def test_several_processes_measure_what_one_does_to_the_bit() -> None:
    model, text = text_model(4, 2), sequences(7, 4)
    batches = text.split(2)
    alone = text_bound(model, batches, num_draws=3)
    told.clear()
    found = [text_bound(model, batches, num_draws=3, processes=Peers(rank, 3)) for rank in (0, 1)][-1:]
    found += [text_bound(model, batches, num_draws=3, processes=Peers(2, 3))]
    assert [sorted(part) for part in told] == [[0, 3], [1], [2]]  # every batch once
    assert found[-1] == alone
    assert found[-1].by_block == alone.by_block


def test_one_token_a_block_is_the_exact_autoregressive_likelihood() -> None:
    """Against the probability of every text of the length: they sum to one."""
    model = text_model(4, 1)
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * 4)
    nll = torch.tensor([text_bound(model, [row[None]]).nats_per_token * 4 for row in every], dtype=torch.float64)
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-10)
    with torch.no_grad():
        clean = every.reshape(-1, 4, 1)
        cache, chain = model.new_cache(len(every)), torch.zeros(len(every), dtype=torch.float64)
        for place in range(4):
            asked = torch.full((len(every), 1), model.mask_token)
            log_p = model.denoise(asked, 0.0, None, cache)[:, 0].log_softmax(-1)
            chain -= log_p.gather(-1, every[:, place : place + 1])[:, 0]
            if place < 3:
                model.prefill(clean[:, place : place + 1], cache)
    torch.testing.assert_close(nll, chain, rtol=0, atol=1e-10)
    found = text_bound(model, [every], draw="rate")
    assert found.interval == (found.nats_per_token, found.nats_per_token)
    assert found.nats_per_token * 4 == pytest.approx(float(chain.mean()), abs=1e-10)
    assert found.num_draws == 1
    assert "exact" in found.protocol
    told = text_model(4, 1, time_conditioning=True)
    for draw in ("rate", "count"):
        bound = text_bound(told, [every], draw=draw).nats_per_token
        assert bound == pytest.approx(text_bound(told, [every]).nats_per_token, abs=1e-12)


def test_a_bound_lies_above_the_likelihood_it_bounds() -> None:
    """One block of two tokens: the likelihood of the sampler that reveals them in either order."""
    model = text_model(2, 2)
    every = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    with torch.no_grad():

        def p(state: list[int]) -> torch.Tensor:
            return model.denoise(torch.tensor([state]), 0.0, None, model.new_cache(1))[0].softmax(-1)

        mask = VOCAB
        empty = p([mask, mask])
        likelihood = [
            0.5 * float(empty[0, a] * p([a, mask])[1, b]) + 0.5 * float(empty[1, b] * p([mask, b])[0, a])
            for a, b in every.tolist()
        ]
    assert sum(likelihood) == pytest.approx(1)
    bound = exact_bound(model, every[:, None]).sum((-2, -1))
    assert (bound >= -torch.tensor(likelihood).double().log() - 1e-12).all()


def test_a_given_first_token_does_not_count() -> None:
    model, text = text_model(4, 1), sequences(3, 4)
    all_of_it = text_bound(model, [text])
    found = text_bound(model, [text], first_token_given=True)
    assert found.tokens == 9
    assert found.nats_per_token * 3 == pytest.approx(4 * all_of_it.nats_per_token - all_of_it.by_block[0], abs=1e-10)
    assert math.isnan(found.by_block[0])
    assert "not counted" in found.protocol
    assert found.bits_per_character(18) == pytest.approx(found.nats_per_token * 9 / 18 / math.log(2))


def test_the_same_text_cut_otherwise_gives_the_same_bound_within_its_interval() -> None:
    model, text = text_model(6, 3), sequences(8)
    one, other = (text_bound(model, text.split(size), num_draws=40) for size in (8, 3))
    assert one != other
    assert abs(one.nats_per_token - other.nats_per_token) < 0.1
    assert text_bound(model, [text], num_draws=40) == one


def test_what_cannot_be_measured_is_refused() -> None:
    model = text_model(6, 3)
    for options, name in (({"num_draws": 0}, "num_draws"), ({"draw": "all"}, "mask_draw")):
        with pytest.raises(ConfigError, match=name):
            text_bound(model, [sequences(1)], **options)
    with pytest.raises(ConfigError, match="rate"):
        text_bound(text_model(6, 3, time_conditioning=True), [sequences(1)])
    with pytest.raises(DataError, match="no sequence"):
        text_bound(model, [])
    with pytest.raises(DataError, match=r"sequence 2.*token 3"):
        text_bound(model, [sequences(2), torch.tensor([[0, 0, 0, 0, 0, 3]])])
    with torch.no_grad():
        model.final_layer.linear.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="sequence 0"):
        text_bound(model, [sequences(1)])
