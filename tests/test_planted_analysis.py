"""Mistakes of the analysis, each planted on purpose (see tests/test_planted_faults.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from acdit import costs
from acdit.analysis import counting, mask_picture
from acdit.evaluation import likelihood
from acdit.flops import Architecture
from acdit.mask import Streams, Window
from tests.analysis import test_flops, test_mask_picture, test_memory
from tests.evaluation import test_likelihood
from tests.planted import Plant, require_caught


def attention_of_the_cpu_counted_as_nothing(patch: pytest.MonkeyPatch) -> None:
    """As torch's own counter has it."""
    patch.setattr(counting, "_pairs", lambda *arguments: 0)


def a_counter_that_knows_no_window(patch: pytest.MonkeyPatch) -> None:
    pairs = counting._pairs
    patch.setattr(
        counting, "_pairs", lambda q, clean, blocks, copies, window, sinks: pairs(q, clean, blocks, copies, 0, 0)
    )


def a_closed_form_that_knows_no_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Architecture, "_seen_before", lambda self, blocks: blocks * (blocks - 1) // 2)


def prefill_counted_with_the_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(counting.PartCounter, "reading", lambda self: nullcontext())


def the_answer_in_sight(patch: pytest.MonkeyPatch) -> None:
    """A noisy block sees the clean block at its own place, in the picture."""
    dense = mask_picture.dense_mask

    def leaking(streams: Streams) -> Tensor:
        allowed = dense(streams).clone()
        for block in range(streams.num_clean):
            allowed[streams.num_clean + block, block] = True
        return allowed

    patch.setattr(mask_picture, "dense_mask", leaking)


def a_picture_without_its_window(patch: pytest.MonkeyPatch) -> None:
    dense = mask_picture.dense_mask
    patch.setattr(
        mask_picture, "dense_mask", lambda s: dense(Streams(s.num_clean, s.num_blocks, s.copies, s.block_tokens))
    )


def the_second_branch_forgotten(patch: pytest.MonkeyPatch) -> None:
    memory = costs.sampling_memory
    patch.setattr(costs, "sampling_memory", lambda arch, batch, **options: memory(arch, batch, guided=False))


def rare_timesteps_that_count_like_any(patch: pytest.MonkeyPatch) -> None:
    drawn = likelihood._timesteps

    def evenly(*arguments: object) -> tuple[Tensor, Tensor]:
        timestep, weight = drawn(*arguments)  # type: ignore[arg-type]
        return timestep, torch.cat([weight[:, :1], weight[:, 1:].mean().expand_as(weight[:, 1:])], dim=1)

    patch.setattr(likelihood, "_timesteps", evenly)


def intervals_half_as_wide(patch: pytest.MonkeyPatch) -> None:
    """68 % taken for 95."""
    patch.setattr(likelihood, "NORMAL_95", likelihood.NORMAL_95 / 2)


FAULTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "attention of the CPU counted as nothing": (
        attention_of_the_cpu_counted_as_nothing,
        lambda: test_flops.test_a_training_steps_parts_are_the_counted_ones("video, whole frames", 1, "none"),
    ),
    "a counter that knows no window": (
        a_counter_that_knows_no_window,
        lambda: test_flops.test_attentions_formulas_count_the_masks_pairs(Window(1, 0), False),
    ),
    "a closed form that knows no window": (
        a_closed_form_that_knows_no_window,
        lambda: test_flops.test_a_training_steps_parts_are_the_counted_ones(
            "video, parts of frames, window and sink", 1, "none"
        ),
    ),
    "prefill counted with the steps": (
        prefill_counted_with_the_steps,
        lambda: test_flops.test_a_samples_parts_are_the_counted_ones("squares", True),
    ),
    "the answer in sight": (
        the_answer_in_sight,
        lambda: test_mask_picture.test_every_pixel_is_the_rules("four squares", "block"),
    ),
    "a picture without its window": (
        a_picture_without_its_window,
        lambda: test_mask_picture.test_every_pixel_is_the_rules("window", "block"),
    ),
    "guidance's second branch forgotten": (
        the_second_branch_forgotten,
        lambda: test_memory.test_the_peak_of_sampling_is_the_allocators("squares", 2),
    ),
    "rare timesteps that count like any": (
        rare_timesteps_that_count_like_any,
        lambda: test_likelihood.test_a_few_timesteps_estimate_the_sum_over_all("large"),
    ),
    "intervals half as wide": (
        intervals_half_as_wide,
        test_likelihood.test_intervals_hold_the_truth_as_often_as_they_say,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, named_test = FAULTS[fault]
    require_caught(plant, named_test, monkeypatch)
