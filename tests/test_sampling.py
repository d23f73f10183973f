"""The block loop: against a loop without a cache, in any batch, with any diffusers scheduler."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from acdit.errors import ConfigError
from acdit.sampling import DenoisingStep, Staying, generators_from_seed, sample_blocks
from tests.conftest import blocks_like, tiny_model

SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "sde-dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}


def sample(model: object, scheduler: object, **options: object) -> torch.Tensor:
    return torch.stack(list(sample_blocks(model, scheduler, **options)), dim=1)


def uncached(
    model: object, scheduler: object, labels: torch.Tensor, steps: int, scale: float, seed: int
) -> torch.Tensor:
    """Guided sampling with the training forward only: no cache, no `denoise`, two separate branches."""
    batch, layout = len(labels), model.layout
    generators = generators_from_seed(seed, batch)
    blocks = torch.zeros(batch, layout.num_blocks, layout.block_tokens, model.token_dim, dtype=torch.float64)
    for block in range(layout.num_blocks):
        label = labels if labels.ndim == 1 else labels[:, block]
        null = torch.full_like(label, model.null_label)
        solver = copy.deepcopy(scheduler)
        solver.set_timesteps(steps)
        x = torch.stack([torch.randn(blocks.shape[2:], generator=g) for g in generators]).double()
        for t in solver.timesteps:
            noisy = torch.zeros_like(blocks)
            noisy[:, block] = x
            conditional = model(blocks, noisy, t, label).sample[:, block]
            unconditional = model(blocks, noisy, t, null).sample[:, block]
            x = solver.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
        blocks[:, block] = x
    return blocks


def test_cached_guided_sampling_equals_a_loop_over_the_training_forward() -> None:
    model, labels = tiny_model(), torch.tensor([1, 4])
    with torch.no_grad():
        expected = uncached(model, DPMSolverMultistepScheduler(), labels, steps=4, scale=2.0, seed=11)
    out = sample(
        model,
        DPMSolverMultistepScheduler(),
        class_labels=labels,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=11,
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sample_is_the_same_in_any_batch(name: str) -> None:
    model, scheduler = tiny_model(), SCHEDULERS[name]()
    options = {"num_inference_steps": 3, "guidance_scale": 1.5}
    together = sample(model, scheduler, class_labels=[0, 3, 2], generator=20, **options)
    assert torch.isfinite(together).all()
    for index, label in enumerate([0, 3, 2]):
        alone = sample(model, scheduler, class_labels=[label], generator=20 + index, **options)
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-10)
    last_two = sample(model, scheduler, class_labels=[3, 2], generator=generators_from_seed(21, 2), **options)
    torch.testing.assert_close(last_two, together[1:], rtol=0, atol=1e-10)


class Leaving:
    """A callback that takes samples out of a batch.

    Args:
        at: (block, step) → places in the batch of those that stay.
    """

    def __init__(self, at: dict[tuple[int, int], list[int]]) -> None:
        self.at, self.sizes = at, []

    def __call__(self, step: DenoisingStep) -> Staying | None:
        self.sizes.append(len(step.noisy))
        stay = self.at.get((step.block, step.step))
        return None if stay is None else Staying(stay)


# What else remembers several steps: nothing of it may stay behind.
REMEMBERING = {**SCHEDULERS, "pndm": PNDMScheduler, "deis": DEISMultistepScheduler, "lms": LMSDiscreteScheduler}


@pytest.mark.parametrize("name", REMEMBERING)
def test_samples_leave_at_a_step_and_the_others_do_not_notice(name: str) -> None:
    model, scheduler, labels = tiny_model(), REMEMBERING[name](), [0, 3, 2, 4]
    options = {"num_inference_steps": 6, "guidance_scale": 1.5}
    alone = [
        sample(model, scheduler, class_labels=[label], generator=20 + index, **options)[0]
        for index, label in enumerate(labels)
    ]
    leaving, cache = Leaving({(0, 2): [3, 0, 1], (1, 5): [2, 0], (2, 0): [1]}), model.new_cache(4)
    size = cache.nbytes
    blocks = list(
        sample_blocks(model, scheduler, class_labels=labels, generator=20, cache=cache, on_step=leaving, **options)
    )
    assert [len(block) for block in blocks] == [3, 2, 1, 1]
    assert leaving.sizes[:4] == [4, 4, 4, 3]  # from the next step on
    assert (cache.batch_size, cache.nbytes) == (1, size // 4)
    for block, samples in enumerate(([3, 0, 1], [1, 3], [3], [3])):
        for row, who in enumerate(samples):
            torch.testing.assert_close(blocks[block][row], alone[who][block], rtol=0, atol=1e-10)


def test_whoever_leaves_whenever_the_rest_is_what_the_training_forward_gives() -> None:
    """By brute force: every sample alone, without a cache; departures drawn at random, labels that change."""
    draws, labels = np.random.default_rng(5), torch.tensor([[1, 0, 2, 4], [4, 4, 1, 0], [2, 3, 3, 1]])
    model, scheduler = tiny_model(), DPMSolverMultistepScheduler()
    with torch.no_grad():
        expected = uncached(model, scheduler, labels, steps=3, scale=2.0, seed=11)
    for _ in range(12):
        who, at, told = [0, 1, 2], {}, {}
        for block in range(4):
            for step in range(3):
                if len(who) > 1 and draws.random() < 0.25:
                    stay = draws.permutation(len(who))[: draws.integers(1, len(who) + 1)].tolist()
                    at[block, step], who = stay, [who[place] for place in stay]
            told[block] = who
        options = {"class_labels": labels, "num_inference_steps": 3, "guidance_scale": 2.0, "generator": 11}
        for block, made in enumerate(sample_blocks(model, scheduler, on_step=Leaving(at), **options)):
            torch.testing.assert_close(made, expected[told[block], block], rtol=0, atol=1e-10)


def test_who_may_not_leave() -> None:
    options = {"class_labels": [1, 2], "num_inference_steps": 2}
    for wrong, generator in (([], 0), ([2], 0), ([0, 0], 0), ([0], torch.Generator()), ([0], None)):
        field = "samples" if generator == 0 else "generator"
        with pytest.raises(ConfigError, match=field):
            sample(tiny_model(), DDIMScheduler(), generator=generator, on_step=Leaving({(0, 0): wrong}), **options)


def test_in_fp32_the_8_bit_picture_is_the_same_in_any_batch() -> None:
    """At most one level off on 0.1 % of the values."""
    model = tiny_model(dtype=torch.float32)
    options = {"num_inference_steps": 5, "guidance_scale": 1.5}

    def levels(blocks: torch.Tensor) -> torch.Tensor:
        return (blocks.clamp(-1, 1) * 127.5 + 127.5).round()

    labels = [index % 5 for index in range(16)]
    together = levels(sample(model, DPMSolverMultistepScheduler(), class_labels=labels, generator=0, **options))
    alone = torch.cat(
        [
            levels(sample(model, DPMSolverMultistepScheduler(), class_labels=[labels[i]], generator=i, **options))
            for i in range(16)
        ]
    )
    assert (together - alone).abs().max() <= 1
    assert (together != alone).float().mean() <= 1e-3


def test_a_single_generator_follows_diffusers() -> None:
    model = tiny_model(num_classes=None)
    out = sample(
        model, DDIMScheduler(), batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(5)
    )
    noise = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(5)).double()
    solver = DDIMScheduler()
    solver.set_timesteps(2)
    cache = model.new_cache(2)
    for t in solver.timesteps:
        with torch.no_grad():
            noise = solver.step(model.denoise(noise, t, None, cache), t, noise).prev_sample
    assert torch.equal(out[:, 0], noise)


def test_the_callers_scheduler_is_left_alone() -> None:
    model, scheduler = tiny_model(), DPMSolverMultistepScheduler()
    scheduler.set_timesteps(7)
    first = sample(model, scheduler, class_labels=[1], num_inference_steps=3, generator=0)
    assert len(scheduler.timesteps) == 7
    assert scheduler.step_index is None
    assert torch.equal(first, sample(model, scheduler, class_labels=[1], num_inference_steps=3, generator=0))


def test_blocks_come_one_by_one_and_the_rest_is_not_computed() -> None:
    model = tiny_model()
    steps: list[int] = []
    blocks = sample_blocks(
        model,
        DDIMScheduler(),
        class_labels=[1],
        num_inference_steps=2,
        generator=0,
        on_step=lambda s: steps.append(s.block),
    )
    next(blocks)
    assert steps == [0, 0]
    next(blocks)
    assert steps == [0, 0, 1, 1]
    blocks.close()


def test_a_prefix_is_continued_as_if_it_had_been_generated() -> None:
    model, options = tiny_model(), {"num_inference_steps": 3, "guidance_scale": 1.5, "class_labels": [1, 2]}
    whole = sample(model, DDIMScheduler(), generator=3, **options)
    generators = generators_from_seed(3, 2)
    for generator in generators:  # the first two blocks' draws
        torch.randn(2, 16, 2, generator=generator)
    rest = sample(model, DDIMScheduler(), prefix=whole[:, :2], generator=generators, **options)
    assert rest.shape[1] == 2
    torch.testing.assert_close(rest, whole[:, 2:], rtol=0, atol=1e-10)


def test_one_prefix_serves_many_samples_and_a_forked_cache_does_the_same() -> None:
    model = tiny_model()
    prefix = blocks_like(model, 1)[:, :2]
    options = {"num_inference_steps": 2, "class_labels": [0, 1, 2], "generator": 0}
    shared = sample(model, DDIMScheduler(), prefix=prefix, **options)
    cache = model.new_cache(1)
    model.prefill(prefix, cache)
    forked = sample(model, DDIMScheduler(), cache=cache.fork(3), **options)
    torch.testing.assert_close(shared, forked, rtol=0, atol=1e-12)


def test_a_label_can_be_switched_between_blocks() -> None:
    model, options = tiny_model(), {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": 0}
    ones = sample(model, DDIMScheduler(), class_labels=[1], **options)
    switched = sample(model, DDIMScheduler(), class_labels=[[1, 1, 3, 3]], **options)
    assert torch.equal(switched[:, :2], ones[:, :2])
    assert (switched[:, 2] - ones[:, 2]).abs().max() > 1e-3


def test_steps_and_guidance_may_differ_per_block() -> None:
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    varied = sample(
        model, DDIMScheduler(), class_labels=[1], num_inference_steps=[1, 2, 3, 4], guidance_scale=[1.0, 1.5, 2.0, 3.0],
        generator=0, on_step=lambda s: seen.append((s.block, s.num_steps)),
    )  # fmt: skip
    assert seen == [(block, block + 1) for block in range(4) for _ in range(block + 1)]
    first = sample(model, DDIMScheduler(), class_labels=[1], num_inference_steps=1, generator=0)
    assert torch.equal(varied[:, 0], first[:, 0])
    assert (varied[:, 1] - first[:, 1]).abs().max() > 1e-3


def test_outside_its_interval_guidance_is_off() -> None:
    model, options = tiny_model(), {"class_labels": [1], "num_inference_steps": 4, "generator": 0}
    off = sample(model, DDIMScheduler(), **options)
    on = sample(model, DDIMScheduler(), guidance_scale=3.0, **options)
    nowhere = sample(model, DDIMScheduler(), guidance_scale=3.0, guidance_interval=(2000, 3000), **options)
    everywhere = sample(model, DDIMScheduler(), guidance_scale=3.0, guidance_interval=(0, 1000), **options)
    some = sample(model, DDIMScheduler(), guidance_scale=3.0, guidance_interval=(200, 600), **options)
    assert torch.equal(nowhere, off)
    assert torch.equal(everywhere, on)
    assert (some - off).abs().max() > 1e-3
    assert (some - on).abs().max() > 1e-3


def test_without_guidance_only_one_branch_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    sizes: list[int] = []
    denoise = model.denoise

    def counting(noisy: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(noisy))
        return denoise(noisy, *rest)

    monkeypatch.setattr(model, "denoise", counting)
    sample(model, DDIMScheduler(), class_labels=[1, 2], num_inference_steps=1)
    sample(model, DDIMScheduler(), class_labels=[1, 2], num_inference_steps=1, guidance_scale=2.0)
    assert sizes == [2] * 4 + [4] * 4


def test_a_callback_may_replace_the_noisy_block() -> None:
    model = tiny_model()

    def zero_at_the_end(step: DenoisingStep) -> torch.Tensor | None:
        return torch.zeros_like(step.noisy) if step.step == step.num_steps - 1 else None

    out = sample(model, DDIMScheduler(), class_labels=[1], num_inference_steps=2, on_step=zero_at_the_end)
    assert out.abs().max() == 0


def test_bf16_models_keep_the_solver_in_fp32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    out = sample(
        model, DPMSolverMultistepScheduler(), class_labels=[1], num_inference_steps=3, guidance_scale=1.5, generator=0
    )
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


BAD: dict[str, tuple[dict[str, object], str]] = {
    "label out of range": ({"class_labels": [6]}, "0 … 4"),
    "label of a wrong kind": ({"class_labels": [0.5]}, "integers"),
    "guidance without labels": ({"guidance_scale": 2.0}, "class_labels"),
    "a prefix of everything": ({"prefix": torch.zeros(1, 4, 16, 2)}, "fewer than"),
    "sizes that disagree": ({"class_labels": [1], "batch_size": 2}, "one number"),
    "too few generators": ({"class_labels": [1, 2], "generator": [torch.Generator()]}, "one per sample"),
    "too few steps": ({"class_labels": [1], "num_inference_steps": [1, 2]}, "one per block"),
    "too few labels": ({"class_labels": [[1, 2]]}, "one per block"),
    "a generator that is none": ({"class_labels": [1], "generator": "3"}, "a seed"),
    "a seed that is no integer": ({"class_labels": [1], "generator": 3.0}, "a seed"),
    "no steps": ({"class_labels": [1], "num_inference_steps": 0}, "at least 1"),
    "guidance that is no number": ({"class_labels": [1], "guidance_scale": float("nan")}, "finite"),
    "an interval upside down": ({"class_labels": [1], "guidance_interval": (700, 200)}, "low <= high"),
    "a cache without room": ({"class_labels": [1], "cache": tiny_model().new_cache(1, 1)}, "room for 1 blocks"),
    "another model's cache": ({"class_labels": [1], "cache": tiny_model(num_layers=3).new_cache(1)}, "new_cache"),
    "another layout's cache": ({"class_labels": [1], "cache": tiny_model(block=(2, 2)).new_cache(1)}, "new_cache"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named_before_anything_runs(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        next(sample_blocks(tiny_model(), DDIMScheduler(), **options))


def test_a_nested_label_holds_for_all_blocks_of_its_sample() -> None:
    model = tiny_model()
    options: dict[str, object] = {"num_inference_steps": 2, "generator": 0}
    nested = list(sample_blocks(model, DDIMScheduler(), class_labels=[[1], [3]], **options))
    torch.testing.assert_close(nested, list(sample_blocks(model, DDIMScheduler(), class_labels=[1, 3], **options)))


def test_an_unconditional_model_takes_no_labels() -> None:
    with pytest.raises(ConfigError, match="unconditional"):
        next(sample_blocks(tiny_model(num_classes=None), DDIMScheduler(), class_labels=[1]))


def test_a_seed_may_be_any_integer_and_generators_any_sequence() -> None:
    model = tiny_model()
    options: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2}
    wanted = sample(model, DDIMScheduler(), generator=3, **options)
    for seed in (np.int64(3), torch.tensor(3), tuple(generators_from_seed(3, 2))):
        assert torch.equal(sample(model, DDIMScheduler(), generator=seed, **options), wanted)
    for steps, scale in ((torch.tensor([2] * 4), np.array([1.0] * 4)), ([2] * 4, [1.0] * 4)):
        given = {"class_labels": [1, 2], "num_inference_steps": steps, "guidance_scale": scale}
        assert torch.equal(sample(model, DDIMScheduler(), generator=3, **given), wanted)
