"""Mistakes of ablations, costs and imported weights, each planted on purpose (see tests/test_planted_faults.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import acdit.dit
from acdit import costs, flops
from acdit.layout import BlockLayout
from acdit.training.batches import Batches
from tests import test_costs, test_dit, test_model
from tests.training import test_context_noise

Plant = Callable[[pytest.MonkeyPatch], None]


def every_block_at_the_first_ones_place(patch: pytest.MonkeyPatch) -> None:
    places = BlockLayout.sequence_positions
    patch.setattr(
        BlockLayout,
        "sequence_positions",
        lambda self, first=0, count=None, device=None: places(self, 0, count, device),
    )


def context_left_clean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Batches, "_context", lambda self, clean, labels, key: clean)


def attention_backward_as_cheap_as_a_linears(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flops, "_BACKWARD_OF_ATTENTION", 2.0)


def gradients_in_flight_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(costs._Kept, "temporary", lambda self, bf16_units: 0.0)


def the_sinusoid_of_diffusers(patch: pytest.MonkeyPatch) -> None:
    load = acdit.dit.DiTTransformer.from_pretrained

    def stock(*arguments: object, **options: object) -> torch.nn.Module:
        transformer = load(*arguments, **options)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 1
        return transformer

    patch.setattr(acdit.dit.DiTTransformer, "from_pretrained", stock)


FAULTS: dict[str, tuple[Plant, Callable[[Path], None]]] = {
    "1-D positions that do not advance": (
        every_block_at_the_first_ones_place,
        lambda path: test_model.test_every_rope_denoises_from_the_cache_as_in_the_forward_and_beyond_the_trained_extent(
            "1d", "sdpa"
        ),
    ),
    "noisy context left clean": (
        context_left_clean,
        lambda path: test_context_noise.test_noisy_context_is_the_corruption_at_keyed_timesteps_below_the_level(
            "epsilon"
        ),
    ),
    "attention's backward counted short": (
        attention_backward_as_cheap_as_a_linears,
        lambda path: test_costs.test_a_steps_flops_are_the_counted_ones("squares", "none"),
    ),
    "gradients in flight forgotten": (
        gradients_in_flight_forgotten,
        lambda path: test_costs.test_the_activation_peak_is_the_allocators("squares", "layers"),
    ),
    "diffusers' own sinusoid": (
        the_sinusoid_of_diffusers,
        lambda path: test_dit.test_the_converted_transformer_computes_what_the_published_dit_does(path, "plain"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant, named_test = FAULTS[fault]
    for part in ("without", "with"):
        (tmp_path / part).mkdir()
    named_test(tmp_path / "without")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            named_test(tmp_path / "with")
