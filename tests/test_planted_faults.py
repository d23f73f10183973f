"""Mistakes that are easy to make here, each planted on purpose: the named test must catch it.

A row that stops failing means that the test beside it can no longer fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acdit import attention, cache, draws, layers, mask, rope, sampling
from acdit.layers import ACDiTLayer, Modulation
from acdit.layout import BlockLayout
from acdit.mask import CLEAN, Streams
from acdit.model import ACDiTTransformer
from tests import test_attention, test_cache, test_draws, test_layout, test_model, test_rope, test_sampling, test_window
from tests.corruption import test_gaussian
from tests.planted import Plant, require_caught


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A noisy block sees its own clean block: it could copy the answer."""

    def rule(query_stream: Any, query_block: Any, key_stream: Any, key_block: Any, window: Any = None) -> Any:
        return ((key_stream == CLEAN) & (key_block <= query_block)) | (
            (key_stream == query_stream) & (key_block == query_block)
        )

    patch.setattr(mask, "may_attend", rule)


def prefix_one_block_short(patch: pytest.MonkeyPatch) -> None:
    readers = Streams.prefix_readers
    patch.setattr(Streams, "prefix_readers", lambda self, first: ((b - 1, r) for b, r in readers(self, first) if b > 1))


def merge_without_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "_merge", lambda out, lse, more, more_lse: ((out + more) / 2, lse))


def noisy_keys_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    attend = layers.attend_prefix_and_own

    def overwriting(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor
    ) -> torch.Tensor:
        pk[:, -k.shape[1] :] = k
        return attend(q, k, v, pk, pv)

    patch.setattr(layers, "attend_prefix_and_own", overwriting)


def label_leaks_into_the_clean_stream(patch: pytest.MonkeyPatch) -> None:
    prefill = ACDiTTransformer.prefill

    def leaking(self: ACDiTTransformer, clean: torch.Tensor, cache: Any) -> None:
        assert self.y_embedder is not None
        hook = self.x_embedder.register_forward_hook(lambda _, __, out: out + self.y_embedder.weight[0])
        prefill(self, clean, cache)
        hook.remove()

    patch.setattr(ACDiTTransformer, "prefill", leaking)


def clean_tokens_gated(patch: pytest.MonkeyPatch) -> None:
    modulation = ACDiTLayer._modulation

    def gated(self: ACDiTLayer, condition: torch.Tensor, num_clean: int = 0, num_noisy: int = -1) -> Modulation:
        made = modulation(self, condition, num_clean, num_noisy)
        if num_clean:
            made.gate_mlp[:, :num_clean] = 0
        return made

    patch.setattr(ACDiTLayer, "_modulation", gated)


def denoising_at_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    turn = ACDiTTransformer._rope
    patch.setattr(ACDiTTransformer, "_rope", lambda self, first, count: turn(self, 0, count))


def blocks_in_column_order(patch: pytest.MonkeyPatch) -> None:
    positions = BlockLayout.positions
    patch.setattr(BlockLayout, "positions", lambda self, *args, **kwargs: positions(self, *args, **kwargs).flip(-1))


def axes_mixed_by_the_rotation(patch: pytest.MonkeyPatch) -> None:
    turn = rope.rotate
    patch.setattr(test_rope, "rotate", lambda x, cos, sin, form: turn(x, cos, sin, "reference"))


def timestep_rounded_to_bf16(patch: pytest.MonkeyPatch) -> None:
    embed = layers.TimestepEmbedder.forward
    patch.setattr(layers.TimestepEmbedder, "forward", lambda self, t: embed(self, t.bfloat16()))


def guidance_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    guided = sampling._guided
    patch.setattr(sampling, "_guided", lambda *args: guided(*args[:-1], 1 - args[-1]))


def solver_shared_between_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sampling.copy, "deepcopy", lambda scheduler: scheduler)


def one_seed_for_all_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        sampling, "generators_from_seed", lambda seed, n: [torch.Generator().manual_seed(seed) for _ in range(n)]
    )


def copies_share_their_noise(patch: pytest.MonkeyPatch) -> None:
    keyed = draws.keyed_generator
    patch.setattr(
        draws, "keyed_generator", lambda seed, stream, step=0, sample=0, copy=0: keyed(seed, stream, step, sample)
    )


def velocity_with_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    corruption = test_gaussian.GaussianCorruption
    target = corruption.target
    patch.setattr(corruption, "target", lambda self, *args: -target(self, *args))


def _moved_window(kind: str) -> None:
    test_window.test_a_windowed_cache_equals_the_training_forward_long_after_the_window_moved("frames", kind)


def window_one_block_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mask.Window, "start", lambda self, block: max(0, block - self.blocks + 1))


def ring_forgets_the_wrong_block(patch: pytest.MonkeyPatch) -> None:
    """The newest block in sight goes instead of the oldest."""
    advance = cache.KVCache.advance

    def wrong(self: Any, tokens: int) -> None:
        self._finished -= 1
        advance(self, tokens)
        self._finished += 1

    patch.setattr(cache.KVCache, "advance", wrong)


def sinks_that_never_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache.KVCache, "turn_sinks", lambda self, turn: None)


FAULTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "window one block short": (
        window_one_block_short,
        lambda: _moved_window("window"),
    ),
    "ring forgets the wrong block": (
        ring_forgets_the_wrong_block,
        lambda: _moved_window("window"),
    ),
    "sinks that never turn": (
        sinks_that_never_turn,
        lambda: _moved_window("sliding sinks"),
    ),
    "off-by-one mask": (
        mask_off_by_one,
        test_attention.test_the_predicate_is_the_rule_on_2000_random_layouts,
    ),
    "off-by-one prefix": (
        prefix_one_block_short,
        lambda: test_model.test_cached_denoising_equals_the_training_forward_block_by_block("image"),
    ),
    "log-sum-exp merge without weights": (
        merge_without_weights,
        lambda: test_attention.test_all_executions_agree_with_brute_force(5),
    ),
    "cache written with noisy keys": (
        noisy_keys_in_the_cache,
        test_cache.test_denoising_does_not_touch_the_cache,
    ),
    "label leaking into the clean stream": (
        label_leaks_into_the_clean_stream,
        test_model.test_the_clean_stream_never_sees_timestep_or_label,
    ),
    "clean tokens gated": (
        clean_tokens_gated,
        lambda: test_model.test_cached_denoising_equals_the_training_forward_block_by_block("image"),
    ),
    "noisy block rotated to the wrong place": (
        denoising_at_the_wrong_place,
        lambda: test_model.test_cached_denoising_equals_the_training_forward_block_by_block("frames"),
    ),
    "positions in column order": (
        blocks_in_column_order,
        test_layout.test_positions_are_the_coordinates_of_the_tokens,
    ),
    "rotation that mixes axes": (
        axes_mixed_by_the_rotation,
        test_rope.test_each_segment_is_an_ordinary_rope,
    ),
    "timestep rounded to bf16": (
        timestep_rounded_to_bf16,
        test_model.test_norms_and_timesteps_are_computed_wide,
    ),
    "guidance the wrong way round": (
        guidance_the_wrong_way_round,
        test_sampling.test_cached_guided_sampling_equals_a_loop_over_the_training_forward,
    ),
    "solver state shared between blocks": (
        solver_shared_between_blocks,
        test_sampling.test_the_callers_scheduler_is_left_alone,
    ),
    "one seed for all samples": (
        one_seed_for_all_samples,
        lambda: test_sampling.test_a_sample_is_the_same_in_any_batch("dpm++"),
    ),
    "noisy copies share their noise": (
        copies_share_their_noise,
        test_draws.test_every_part_of_the_key_counts,
    ),
    "velocity with the wrong sign": (
        velocity_with_the_wrong_sign,
        lambda: test_gaussian.test_one_solver_step_with_the_true_target_recovers_the_clean_data("v_prediction"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_caught(*FAULTS[fault], monkeypatch)
