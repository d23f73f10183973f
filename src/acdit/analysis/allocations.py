"""What torch's CPU allocator hands out while a model trains a step or draws a sample, by the profiler's record.

Exact and reproducible, temporaries inside operators included; what libraries take by themselves is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer
from acdit.recompute import checkpoint_elementwise
from acdit.sampling import sample_blocks


def allocated_peak(run: Callable[[], Any]) -> int:
    """The most bytes held at once while `run` runs, above what was held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes two lines to stderr for every recording
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    sizes: dict[int, int] = {}
    held = peak = 0
    for address, size in _allocations(recorded.profiler.kineto_results.experimental_event_tree()):
        if size < 0:
            # What was there before the recording is not counted when it goes: nothing held it for this run. Garbage of
            # an earlier recording, which Python collects when it likes, would make this one's peak too small.
            held -= sizes.pop(address, 0)
        else:
            sizes[address] = size
            held += size
            peak = max(peak, held)
    return peak


def _allocations(roots: Sequence[Any]) -> list[tuple[int, int]]:
    """Address and bytes, below 0 where it is freed, of every event of the allocator, in the order of time."""
    found, stack = [], list(roots)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def allocated_by_training(config: Mapping[str, Any], batch: int, copies: int, checkpointing: str) -> int:
    """Peak of forward and backward of one micro-batch in fp32, above weights and gradients.

    Raises:
        ConfigError: a model of text.
    """
    model = random_model(config)
    if checkpointing != "none":
        model.enable_gradient_checkpointing(*([checkpoint_elementwise] if checkpointing == "elementwise" else []))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layout, corruption = model.layout, GaussianCorruption()
    clean = torch.zeros(batch, 1, layout.num_blocks, layout.block_tokens, model.token_dim)
    noise = torch.zeros(batch, copies, *clean.shape[2:])
    timestep = torch.zeros(batch, copies, layout.num_blocks, dtype=torch.int64)
    labels = None if model.null_label is None else torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        noisy = corruption.corrupt(clean, noise, timestep)
        (prediction,) = model(clean[:, 0], noisy, timestep, labels, return_dict=False)
        corruption.loss(prediction, clean, noise, timestep).backward()

    return allocated_peak(step)


def allocated_by_sampling(config: Mapping[str, Any], batch: int, guided: bool) -> int:
    """Peak of drawing a batch in fp32, above the weights; a step a block, since further ones do not change it.

    Raises:
        ConfigError: a model of text.
    """
    draw = sampler(random_model(config), batch, guided)
    return allocated_peak(lambda: draw(1))


def sampler(model: ACDiTTransformer, batch: int, guided: bool) -> Callable[[int], None]:
    """A function that draws a batch in so many steps a block, and throws it away."""
    model.eval()
    scheduler = GaussianCorruption().sampling_scheduler()
    labels = None if model.null_label is None else [0] * batch

    def draw(steps: int) -> None:
        blocks = sample_blocks(
            model, scheduler, class_labels=labels, batch_size=batch, num_inference_steps=steps,
            guidance_scale=2.0 if guided else 1.0, generator=torch.Generator(model.device).manual_seed(0),
        )  # fmt: skip
        for _ in blocks:
            pass

    return draw


def random_model(config: Mapping[str, Any]) -> ACDiTTransformer:
    """A model with random weights, for what does not depend on them.

    Raises:
        ConfigError: a model of text.
    """
    if config.get("vocab_size") is not None:
        raise ConfigError(
            "MODEL", found="a model of text", expected="one of continuous data: of text closed forms only",
            fix="--no-measure",
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: ACDiTTransformer = ACDiTTransformer.from_config(dict(config))
    return model
