"""Mistakes that are easy to make with masked text, each planted on purpose: the named test must catch it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from acdit import draws, text_sampling
from acdit.corruption import MaskingCorruption
from acdit.evaluation import perplexity
from acdit.model import ACDiTTransformer
from acdit.text_sampling import AncestralSampler, ConfidenceSampler, FirstHittingSampler
from tests import test_text_model, test_text_sampling
from tests.corruption import test_masking
from tests.evaluation import test_perplexity

Plant = Callable[[pytest.MonkeyPatch], None]


def unweighted_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        MaskingCorruption,
        "token_losses",
        _rewritten(MaskingCorruption.token_losses, "/ self.rate(timestep)", "* (1 + 0 * timestep)"),
    )


def no_mask_at_all_is_drawn_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MaskingCorruption, "_counts", staticmethod(lambda free, mask_range: (0, free + 1)))


def masked_and_unmasked_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    masked = MaskingCorruption.masked
    patch.setattr(MaskingCorruption, "masked", lambda self, noise, timestep: masked(self, 1 - noise, timestep))


def strata_in_the_order_of_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draws, "permutation", lambda n, **key: np.arange(n))


def strata_of_each_part_of_a_batch(patch: pytest.MonkeyPatch) -> None:
    good = draws.low_discrepancy

    def alone(blocks: int, **key: Any) -> torch.Tensor:
        count = len(key["samples"])
        return good(blocks, **{**key, "samples": range(count), "batch_size": count})

    patch.setattr(draws, "low_discrepancy", alone)


def a_given_token_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MaskingCorruption, "counted_tokens", lambda self, num_blocks: num_blocks * self.block_tokens)


def unmasked_tokens_predicted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MaskingCorruption, "log_probabilities", lambda self, logits, noisy: logits.float().log_softmax(-1))


def interval_of_one_deviation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(perplexity, "NORMAL_95", 0.7)


def bound_at_high_rates_only(patch: pytest.MonkeyPatch) -> None:
    timesteps = MaskingCorruption.timesteps
    patch.setattr(MaskingCorruption, "timesteps", lambda self, u: timesteps(self, u / 2))


def left_to_right(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(text_sampling, "_nth_masked", lambda masked, n: masked.long().argmax(-1))


def revealed_by_the_length_of_the_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        AncestralSampler,
        "step",
        _rewritten(AncestralSampler.step, "(self.steps - step) < 1", "self.steps < 1 + 1e9 * (step + 1 == self.steps)"),
    )


def told_the_time_after_the_step(patch: pytest.MonkeyPatch) -> None:
    time = AncestralSampler.time
    patch.setattr(AncestralSampler, "time", lambda self, step, *rest: time(self, step + 1, *rest))


def the_least_sure_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ConfidenceSampler,
        "step",
        _rewritten(ConfidenceSampler.step, ".masked_fill(~masked, -1.0)", ".mul(-1).masked_fill(~masked, -9.0)"),
    )


def one_draw_for_two_decisions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FirstHittingSampler, "step", _rewritten(FirstHittingSampler.step, "u[:, 1:]", "u[:, :1]"))


def prediction_used_after_a_token_has_changed(patch: pytest.MonkeyPatch) -> None:
    writer = text_sampling._Writer
    patch.setattr(writer, "write", _rewritten(writer.write, "if bool(revealed.any()):", "if False:"))


def categorical_in_fp32(patch: pytest.MonkeyPatch) -> None:
    categorical = text_sampling.categorical
    patch.setattr(test_text_sampling, "categorical", lambda p, u: categorical(p.float(), u.float()))


def nucleus_before_temperature(patch: pytest.MonkeyPatch) -> None:
    good = text_sampling.tempered

    def swapped(logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
        return good(good(logits, 1.0, top_p).log(), temperature)

    patch.setattr(text_sampling, "tempered", swapped)


def all_rows_move_their_generators(patch: pytest.MonkeyPatch) -> None:
    good = text_sampling.RowDraws.uniform
    patch.setattr(text_sampling.RowDraws, "uniform", lambda self, rows, count: good(self, torch.ones_like(rows), count))


def clean_blocks_read_masked(patch: pytest.MonkeyPatch) -> None:
    prefill = ACDiTTransformer.prefill
    patch.setattr(
        ACDiTTransformer, "prefill",
        lambda self, clean, cache: prefill(self, torch.full_like(clean, self.mask_token), cache),
    )  # fmt: skip


def _rewritten(function: Any, old: str, new: str) -> Any:
    """The function with a part of its source replaced."""
    import textwrap

    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, (old, source)
    made: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "planted", "exec", 0x1000000), inspect.getmodule(function).__dict__, made)  # type: ignore[union-attr]
    return made[function.__name__]


def law(name: str) -> Callable[[], None]:
    return lambda: test_text_sampling.test_a_sampler_draws_from_its_enumerated_law(name)


FAULTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "loss without 1/t": (
        unweighted_loss, lambda: test_masking.test_the_expectation_of_the_loss_is_the_enumerated_bound("rate"),
    ),
    "a count of zero masked tokens": (
        no_mask_at_all_is_drawn_too, test_masking.test_rates_fill_their_range_and_counts_are_uniform,
    ),
    "masked where it should not be": (
        masked_and_unmasked_the_wrong_way_round,
        test_masking.test_the_loss_is_the_weighted_entropy_of_masked_tokens_alone,
    ),
    "strata in the order of position": (
        strata_in_the_order_of_position, test_masking.test_low_discrepancy_draws_know_nothing_of_position,
    ),
    "strata of each part of a batch": (
        strata_of_each_part_of_a_batch,
        test_masking.test_low_discrepancy_draws_lie_one_in_each_part_whoever_draws_them,
    ),
    "a given token counts": (a_given_token_counts, test_perplexity.test_a_given_first_token_does_not_count),
    "known tokens predicted": (
        unmasked_tokens_predicted, test_masking.test_subs_copies_what_is_known_and_never_predicts_the_mask,
    ),
    "an interval of one deviation": (
        interval_of_one_deviation, test_perplexity.test_the_interval_holds_the_bound_as_often_as_it_says,
    ),
    "the bound at high rates only": (
        bound_at_high_rates_only, test_masking.test_rates_fill_their_range_and_counts_are_uniform,
    ),
    "first hitting from left to right": (left_to_right, test_text_sampling.test_which_tokens_are_revealed_and_how_many),
    "revealed by the length of the step": (
        revealed_by_the_length_of_the_step, test_text_sampling.test_which_tokens_are_revealed_and_how_many,
    ),
    "told the time after the step": (
        told_the_time_after_the_step, test_text_sampling.test_a_model_that_is_told_the_time_is_told_the_steps_own,
    ),
    "the least sure first": (the_least_sure_first, law("surest first")),
    "one draw for place and token": (one_draw_for_two_decisions, law("first hitting")),
    "an old prediction used again": (prediction_used_after_a_token_has_changed, law("first hitting")),
    "categorical draws in fp32": (
        categorical_in_fp32, test_text_sampling.test_categorical_draws_in_fp64_and_never_what_has_no_probability,
    ),
    "the nucleus before the temperature": (nucleus_before_temperature, law("first hitting, warm and cut")),
    "rows that are done draw on": (
        all_rows_move_their_generators,
        lambda: test_text_sampling.test_a_text_is_the_same_in_any_batch(FirstHittingSampler()),
    ),
    "clean blocks read as masks": (
        clean_blocks_read_masked,
        lambda: test_text_model.test_the_cache_gives_what_the_training_forward_gives(2, {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, named_test = FAULTS[fault]
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises((AssertionError, ValueError)):
            named_test()
