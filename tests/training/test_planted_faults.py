"""Mistakes of training, each planted on purpose: the named test must catch it (see tests/test_planted_faults.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import draws
from acdit.training import checkpoints
from acdit.training.batches import Batches, DataOrder
from acdit.training.ema import EMAWeights
from acdit.training.loop import Trainer
from tests.training import test_schedules_and_averages, test_training

Plant = Callable[[pytest.MonkeyPatch], None]
Test = Callable[[Path], None]


def _not_restored(keep: Callable[[checkpoints.RunState], list[torch.Tensor]]) -> Plant:
    """Tensors of the state that a resumed run finds as a new run makes them."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        restore = checkpoints.restore

        def forgetful(state: checkpoints.RunState, *arguments: Any, **options: Any) -> list[str]:
            checkpoints._moments(state)
            kept = [tensor.clone() for tensor in keep(state)]
            notes = restore(state, *arguments, **options)
            with torch.no_grad():
                for tensor, value in zip(keep(state), kept, strict=True):
                    tensor.copy_(value)
            return notes

        patch.setattr(checkpoints, "restore", forgetful)

    return plant


def _second_average(state: checkpoints.RunState) -> list[torch.Tensor]:
    return list(state.ema.weights(1).values())


def _moments(state: checkpoints.RunState) -> list[torch.Tensor]:
    return [slots["exp_avg_sq"] for slots in state.optimizer.state.values()]


def averages_forget_their_age(patch: pytest.MonkeyPatch) -> None:
    """The warm-up of the averages starts over after a resumption."""
    patch.setattr(EMAWeights, "counters", property(EMAWeights.counters.fget, lambda self, values: None))


def learning_rate_starts_over(patch: pytest.MonkeyPatch) -> None:
    restore = checkpoints.restore

    def forgetful(state: checkpoints.RunState, *arguments: Any, **options: Any) -> list[str]:
        notes = restore(state, *arguments, **options)
        state.lr_scheduler.last_epoch = 0
        return notes

    patch.setattr(checkpoints, "restore", forgetful)


def data_start_over(patch: pytest.MonkeyPatch) -> None:
    """A resumed run sees the first batches again."""
    init = Batches.__init__

    def first(self: Batches, built: Any, rank: int, world_size: int, first_step: int, device: torch.device) -> None:
        init(self, built, rank, world_size, 0, device)

    patch.setattr(Batches, "__init__", first)


def micro_batches_summed_not_averaged(patch: pytest.MonkeyPatch) -> None:
    loss = Trainer._loss

    def unscaled(self: Trainer, model: Any, batch: Any) -> torch.Tensor:
        return loss(self, model, batch) * self.recipe.optim.accumulation

    patch.setattr(Trainer, "_loss", unscaled)


def ranks_see_the_same_samples(patch: pytest.MonkeyPatch) -> None:
    init = Batches.__init__

    def alike(self: Batches, built: Any, rank: int, world_size: int, first_step: int, device: torch.device) -> None:
        init(self, built, 0, world_size, first_step, device)

    patch.setattr(Batches, "__init__", alike)


def noise_by_place_in_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Draws are keyed by the position in the micro-batch instead of the global batch."""
    normal = draws.normal

    def local(shape: tuple[int, ...], *, samples: range, **key: Any) -> torch.Tensor:
        return normal(shape, samples=range(len(samples)), **key)

    patch.setattr(draws, "normal", local)


def every_epoch_alike(patch: pytest.MonkeyPatch) -> None:
    permutation = draws.permutation
    patch.setattr(draws, "permutation", lambda length, **key: permutation(length, **{**key, "step": 0}))


def an_epoch_short_of_a_sample(patch: pytest.MonkeyPatch) -> None:
    init = DataOrder.__init__
    patch.setattr(DataOrder, "__init__", lambda self, length, seed: init(self, length - 1, seed))


def averages_left_in_the_model(patch: pytest.MonkeyPatch) -> None:
    draw = Trainer._draw

    def leaving(self: Trainer, report: Any) -> None:
        draw(self, report)
        self.state.model.load_state_dict(self.state.ema.weights(0))

    patch.setattr(Trainer, "_draw", leaving)


def averages_one_step_behind(patch: pytest.MonkeyPatch) -> None:
    step = EMAWeights.step

    def late(self: EMAWeights, model: torch.nn.Module) -> None:
        if self.counters[0] or getattr(self, "called", False):
            step(self, model)
        self.called = True

    patch.setattr(EMAWeights, "step", late)


def resumed(variant: str) -> Test:
    return lambda path: test_training.test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(variant, path)


FAULTS: dict[str, tuple[Plant, Test]] = {
    "EMA not restored": (_not_restored(_second_average), resumed("plain")),
    "moments not restored": (_not_restored(_moments), resumed("plain")),
    "EMA warm-up starts over": (averages_forget_their_age, resumed("plain")),
    "learning rate starts over": (learning_rate_starts_over, resumed("cosine with warm-up, no clipping")),
    "data start over": (data_start_over, resumed("plain")),
    "micro-batches summed, not averaged": (
        micro_batches_summed_not_averaged,
        test_training.test_accumulation_equals_one_batch,
    ),
    "ranks see the same samples": (
        ranks_see_the_same_samples,
        lambda _: test_training.test_micro_batches_and_ranks_cut_one_global_batch(),
    ),
    "noise by place in the micro-batch": (
        noise_by_place_in_the_micro_batch,
        test_training.test_accumulation_equals_one_batch,
    ),
    "every epoch alike": (
        every_epoch_alike,
        lambda _: test_training.test_every_epoch_shows_every_sample_once_in_another_order(),
    ),
    "an epoch short of a sample": (
        an_epoch_short_of_a_sample,
        lambda _: test_training.test_every_epoch_shows_every_sample_once_in_another_order(),
    ),
    "averages left in the model": (
        averages_left_in_the_model,
        test_training.test_looking_at_the_averages_leaves_training_alone,
    ),
    "averages one step behind": (
        averages_one_step_behind,
        lambda _: test_schedules_and_averages.test_averages_follow_their_definition(True),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant, named_test = FAULTS[fault]
    torch.manual_seed(0)
    (tmp_path / "sound").mkdir()
    named_test(tmp_path / "sound")
    torch.manual_seed(0)
    (tmp_path / "planted").mkdir()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            named_test(tmp_path / "planted")
