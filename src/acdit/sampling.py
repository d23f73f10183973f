"""The blocks × steps loop (paper section 4.2, Figure 2b): a generator that yields finished blocks.

Guidance and solver live here; the model only predicts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from acdit.cache import KVCache
from acdit.errors import ConfigError
from acdit.model import ACDiTTransformer, wide_dtype

Generators = int | torch.Generator | Sequence[torch.Generator] | None


@dataclass
class DenoisingStep:
    """What a step callback sees: the block after one solver step."""

    block: int
    """Index of the autoregressive block."""
    step: int
    """Index of the step inside the block."""
    num_steps: int
    timestep: Tensor
    noisy: Tensor
    """(B, L, D) after the step; clean once `step` is the last."""
    estimate: Callable[[], Tensor] = field(repr=False)
    """What the clean block looked like from before the step, (B, L, D); computed when it is called."""


@dataclass(frozen=True)
class Staying:
    """What a step callback returns to take samples out of the batch: those that stay; nothing of the others is kept."""

    samples: Sequence[int]
    """Their places in the batch as it is, in the order they will have."""


StepCallback = Callable[[DenoisingStep], Tensor | Staying | None]
Guidance = float | Sequence[float] | Callable[[], float | Sequence[float]]


def generators_from_seed(seed: int, batch_size: int) -> list[torch.Generator]:
    """One CPU stream per sample: sample i gets seed + i, so its picture does not depend on the batch it is in."""
    return [torch.Generator().manual_seed(seed + index) for index in range(batch_size)]


@torch.no_grad()
def sample_blocks(
    model: ACDiTTransformer,
    scheduler: SchedulerMixin,
    *,
    class_labels: Tensor | Sequence[int] | None = None,
    batch_size: int | None = None,
    num_inference_steps: int | Sequence[int] = 25,
    guidance_scale: Guidance = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    prefix: Tensor | None = None,
    cache: KVCache | None = None,
    num_blocks: int | None = None,
    generator: Generators = None,
    on_step: StepCallback | None = None,
) -> Iterator[Tensor]:
    """Generate block after block; each is yielded as soon as it is finished.

    Args:
        model: predicts; in any dtype. The solver's state is kept in fp32 or wider.
        scheduler: any diffusers scheduler; copied, with a fresh state for every block.
        class_labels: (B,), or (B, N) for a label per block of the grid; None: no label.
        batch_size: B, where neither labels nor prefix nor cache tell it; default 1.
        num_inference_steps: solver steps a block, or one number per block of the grid.
        guidance_scale: s in u + s·(c − u) (classifier-free guidance); 1 is off and costs nothing. Or one per
            block, or a function that gives either: it is asked before every step.
        guidance_interval: (low, high) timesteps, inclusive, outside which guidance is off (Kynkäänniemi et al. 2024).
        prefix: (B, n, L, D) clean blocks to continue from; (1, n, L, D) serves all samples.
        cache: to go on from (it may be forked); it is written to. Default: a new one.
        num_blocks: how many blocks to generate; default: to the end of the grid.
        generator: a list gives one stream per sample; a seed s gives sample i the seed s + i: the same picture
            whatever batch it is in. A single `torch.Generator` draws for the whole batch, as in diffusers.
        on_step: called after every solver step; a tensor it returns takes the place of the noisy block. `Staying` takes
            samples out of the batch there and then, out of `cache` too; the others go on as if they had been alone.
            That needs a generator per sample.

    Yields:
        (B, L, D), one finished block after another, in fp32 or wider; B is what is left of the batch.

    Raises:
        ConfigError: labels out of range, sequences of a wrong length, shapes that do not fit.
    """
    if model.mask_token is not None:
        raise ConfigError(
            "model",
            found="a model of token ids",
            expected="one of continuous data",
            fix="acdit.text_sampling.sample_tokens, or ACDiTTextPipeline",
        )
    layout, device = model.layout, model.execution_device
    dtype = model.x_embedder.weight.dtype
    labels = _labels(model, class_labels)
    batch = _batch_size(labels, batch_size, prefix, cache)
    generator = as_generators(generator, batch)
    held = cache.num_blocks if cache is not None else 0
    first = held + (prefix.shape[1] if prefix is not None else 0)
    count = layout.num_blocks - first if num_blocks is None else num_blocks
    if count < 1:
        raise ConfigError(
            "prefix", found=f"{first} blocks given", expected=f"fewer than the grid's {layout.num_blocks}"
        )
    num_inference_steps = _listed(num_inference_steps)
    if guidance_interval is not None and not guidance_interval[0] <= guidance_interval[1]:
        raise ConfigError("guidance_interval", found=str(guidance_interval), expected="(low, high) with low <= high")
    _require_labels(labels, layout.num_blocks, first + count)
    schedule = _BlockSchedule(
        layout.num_blocks, first + count, num_inference_steps, guidance_scale, labelled=labels is not None
    )
    for block in range(first, first + count):
        schedule.guidance(block)  # what it cannot take is said before anything is computed
    if cache is None:
        cache = model.new_cache(batch, first + count - 1)
    cache.require_fits(
        model.layout.block_tokens, len(model.layers), model.config.num_attention_heads, first + count - 1
    )
    if prefix is not None:
        model.prefill(prefix.expand(batch, -1, -1, -1).to(device, dtype), cache)
    samples = _Samples(cache, labels, generator)
    for block in range(first, first + count):
        shape = (cache.batch_size, layout.block_tokens, model.token_dim)
        noise = _noise(shape, samples.generator, device).to(wide_dtype(dtype))
        finished = _denoise_block(model, scheduler, noise, block, schedule, guidance_interval, samples, on_step)
        yield finished
        if block + 1 < first + count:  # the last block has no reader
            model.prefill(finished[:, None].to(dtype), cache)


def _listed(values: Any) -> Any:
    """Arrays and tensors as plain numbers; numbers and sequences as they are."""
    return values.tolist() if hasattr(values, "tolist") else values


class _BlockSchedule:
    """Steps and guidance of each block, given once or per block."""

    def __init__(
        self, num_blocks: int, needed: int, steps: int | Sequence[int], guidance: Guidance, labelled: bool
    ) -> None:
        self._num_blocks, self._needed = num_blocks, needed
        self._require_per_block("num_inference_steps", steps, least=1)
        self._steps, self._guidance, self._labelled = steps, guidance, labelled

    def _require_per_block(self, name: str, values: Any, least: int | None = None) -> None:
        if isinstance(values, Sequence) and len(values) < self._needed:
            raise ConfigError(name, found=f"{len(values)} values", expected=f"one per block, {self._num_blocks}")
        for value in values if isinstance(values, Sequence) else [values]:
            if not math.isfinite(value) or (least is not None and value < least):
                expected = "a finite number" if least is None else f"at least {least}"
                raise ConfigError(name, found=str(value), expected=expected)

    def steps(self, block: int) -> int:
        return self._steps[block] if isinstance(self._steps, Sequence) else self._steps

    def guidance(self, block: int) -> float:
        """Of the next step. Raises ConfigError where it is no finite number, or guides without labels."""
        scales = _listed(self._guidance() if callable(self._guidance) else self._guidance)
        self._require_per_block("guidance_scale", scales)
        scale = float(scales[block] if isinstance(scales, Sequence) else scales)
        if scale != 1.0 and not self._labelled:
            raise ConfigError(
                "guidance_scale", found="guidance without labels", expected="class_labels, or guidance_scale=1"
            )
        return scale


@dataclass
class _Samples:
    """What belongs to the samples of a batch one by one, but for their noisy block."""

    cache: KVCache
    labels: Tensor | None
    """(B,) or (B, N)."""
    generator: Generators

    def labels_of(self, block: int) -> Tensor | None:
        return self.labels if self.labels is None or self.labels.ndim == 1 else self.labels[:, block]

    def keep(self, samples: Sequence[int]) -> None:
        """Let the others go.

        Raises:
            ConfigError: no sample stays, or they draw from one generator: the others' noise would change.
        """
        if not isinstance(self.generator, list):
            raise ConfigError(
                "generator", found="one for all samples, and some leave the batch", expected="a list, or a seed"
            )
        self.cache.keep(samples)
        self.labels = None if self.labels is None else self.labels[list(samples)]
        self.generator = [self.generator[sample] for sample in samples]


def _keep_in_solver(solver: SchedulerMixin, samples: Sequence[int], shape: torch.Size) -> None:
    """Let samples go from what a scheduler remembers of earlier steps: tensors of the noisy block's shape, and lists
    of them. Its own tables are of other shapes."""

    def kept(held: Any) -> Any:
        if isinstance(held, Tensor) and held.shape == shape:
            return held[list(samples)]
        return [kept(one) for one in held] if isinstance(held, list) else held

    for name, held in vars(solver).items():
        setattr(solver, name, kept(held))


def _denoise_block(
    model: ACDiTTransformer,
    scheduler: SchedulerMixin,
    noise: Tensor,
    block: int,
    schedule: _BlockSchedule,
    guidance_interval: tuple[float, float] | None,
    samples: _Samples,
    on_step: StepCallback | None,
) -> Tensor:
    solver = copy.deepcopy(scheduler)
    solver.set_timesteps(schedule.steps(block), device=noise.device)
    draws = "generator" in inspect.signature(solver.step).parameters
    low, high = guidance_interval if guidance_interval is not None else (float("-inf"), float("inf"))
    cache = samples.cache
    noisy = noise * getattr(solver, "init_noise_sigma", 1.0)  # flow schedulers start from unit noise
    for step, timestep in enumerate(solver.timesteps):
        model_input = solver.scale_model_input(noisy, timestep) if hasattr(solver, "scale_model_input") else noisy
        model_input = model_input.to(model.x_embedder.weight.dtype)
        labels, scale = samples.labels_of(block), schedule.guidance(block)
        if scale != 1.0 and low <= float(timestep) <= high:
            prediction = _guided(model, model_input, timestep, labels, cache, scale)
        else:
            prediction = model.denoise(model_input, timestep, labels, cache).to(noisy.dtype)
        extra = {"generator": samples.generator} if draws else {}
        noisy = solver.step(prediction, timestep, noisy, return_dict=False, **extra)[0]
        if on_step is not None:
            estimate = functools.partial(_predicted_clean, solver, step, timestep, model_input, prediction)
            answer = on_step(DenoisingStep(block, step, len(solver.timesteps), timestep, noisy, estimate))
            if isinstance(answer, Staying):
                samples.keep(answer.samples)
                _keep_in_solver(solver, answer.samples, noisy.shape)
                noisy = noisy[list(answer.samples)]
            else:
                noisy = noisy if answer is None else answer
    return noisy


def _predicted_clean(
    solver: SchedulerMixin, step: int, timestep: Tensor, model_input: Tensor, prediction: Tensor
) -> Tensor:
    """The clean block that a prediction means, (B, L, D) like `prediction`.

    Args:
        solver: with its timesteps set.
        step: index of the prediction's step.
        timestep: its timestep.
        model_input: (B, L, D) what the model was given: at unit variance whatever scale the solver works in.
        prediction: (B, L, D), guidance included.
    """
    seen = model_input.to(prediction.dtype)
    sigmas, config = getattr(solver, "sigmas", None), solver.config
    kind = getattr(config, "prediction_type", "flow_prediction")
    if sigmas is not None and (kind == "flow_prediction" or getattr(config, "use_flow_sigmas", False)):
        return seen - sigmas[step].to(prediction) * prediction
    if sigmas is not None:  # noise over signal
        alpha = 1 / (1 + sigmas[step].to(prediction) ** 2).sqrt()
    else:
        alpha = solver.alphas_cumprod[int(timestep)].to(prediction).sqrt()
    sigma = (1 - alpha**2).clamp(min=0).sqrt()
    if kind == "v_prediction":
        return alpha * seen - sigma * prediction
    return prediction if kind == "sample" else (seen - sigma * prediction) / alpha


def _guided(
    model: ACDiTTransformer, noisy: Tensor, timestep: Tensor, labels: Tensor | None, cache: KVCache, scale: float
) -> Tensor:
    """Classifier-free guidance: both branches in one batch, against one cache."""
    assert labels is not None  # `sample_blocks` refuses guidance without labels
    assert model.null_label is not None
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])
    prediction = model.denoise(noisy.repeat(2, 1, 1), timestep, both, cache).to(wide_dtype(noisy.dtype))
    conditional, unconditional = prediction.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def as_generators(given: Generators, batch: int) -> torch.Generator | list[torch.Generator] | None:
    """A seed in any integer type and any sequence of generators; whatever else would silently not be reproducible."""
    if given is None or isinstance(given, torch.Generator):
        return given
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != batch:
            raise ConfigError("generator", found=f"{len(given)} generators", expected=f"one per sample, {batch}")
        if all(isinstance(one, torch.Generator) for one in given):
            return list(given)
    else:
        with contextlib.suppress(TypeError):
            return generators_from_seed(operator.index(given), batch)
    raise ConfigError(
        "generator", found=type(given).__name__, expected="a seed, a torch.Generator, or a list of them, one per sample"
    )


def _labels(model: ACDiTTransformer, class_labels: Tensor | Sequence[int] | None) -> Tensor | None:
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels, device=model.execution_device)
    if model.null_label is None:
        raise ConfigError("class_labels", found="labels", expected="None: this model is unconditional")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # one label for all blocks of a sample: diffusers' [[3], [7]] for [3, 7]
    if labels.ndim not in (1, 2):
        raise ConfigError("class_labels", found=f"shape {tuple(labels.shape)}", expected="(B,), or (B, N) per block")
    if labels.is_floating_point() or bool(((labels < 0) | (labels > model.null_label)).any()):
        raise ConfigError(
            "class_labels",
            found=str(labels.tolist()),
            expected=f"integers 0 … {model.null_label - 1} ({model.null_label}: none)",
        )
    return labels


def _require_labels(labels: Tensor | None, num_blocks: int, needed: int) -> None:
    if labels is not None and labels.ndim == 2 and labels.shape[1] < needed:
        raise ConfigError("class_labels", found=f"{labels.shape[1]} blocks", expected=f"{num_blocks}, one per block")


def _batch_size(labels: Tensor | None, given: int | None, prefix: Tensor | None, cache: KVCache | None) -> int:
    told = {
        "class_labels": None if labels is None else labels.shape[0],
        "batch_size": given,
        "prefix": None if prefix is None or prefix.shape[0] == 1 else prefix.shape[0],
        "cache": None if cache is None else cache.batch_size,
    }
    sizes = {name: size for name, size in told.items() if size is not None}
    if len(set(sizes.values())) > 1:
        raise ConfigError("batch size", found=str(sizes), expected="one number")
    return next(iter(sizes.values()), 1)


def _noise(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal fp32 draws, on the generator's device (the model's, without one)."""
    if isinstance(generator, list):
        rows = [torch.randn(shape[1:], generator=one, device=one.device) for one in generator]
        return torch.stack([row.to(device) for row in rows])
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device).to(device)
    return torch.randn(shape, device=device)
