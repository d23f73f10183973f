"""What may be asked for: requests as values, and their bounds, which hold before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acdit.errors import ConfigError
from acdit.text_sampling import SAMPLERS

LARGEST_SEED = 2**53 - 1
"""What a browser's numbers hold exactly."""


@dataclass(frozen=True)
class Limits:
    """The most that one request, and all together, may take."""

    steps: int = 200
    """Solver steps a block."""
    samples: int = 8
    """Pictures, clips or texts a request."""
    blocks: int = 64
    """Blocks a request."""
    guidance: float = 20.0
    prompt: int = 2000
    """Characters."""
    new_tokens: int = 1024
    cache_bytes: int = 2**30
    """Keys and values of one request."""
    waiting: int = 16
    """Requests in the queue; one more is told "busy"."""
    batch: int = 16
    """Samples that are denoised at once; waiting requests with the same settings share a batch."""
    patience: float = 15.0
    """Seconds after which a request that nobody listens to is given up."""
    upload_bytes: int = 8 * 2**20


@dataclass(frozen=True)
class SampleRequest:
    """Pictures or clips.

    Args:
        model: name of a served model.
        label: a class; None: the model's first, or none of an unconditional one.
        samples: how many, drawn from seed, seed + 1, …
        seed, steps, guidance: as of `sample_blocks`.
        solver: a name of `acdit.solvers`; None: the model's own.
        block: tokens an axis of a block; None: the model's own.
        blocks: of a clip, how many in all; None: the model's grid.
        given: uint8 (C, T, H, W), T = 1 of a picture: to go on from. Its shape is the model's, see `acdit.app.files`.
        keep: how many of its blocks are kept.
        switches: (block, label): the class from that block on.
    """

    model: str
    label: int | None = None
    samples: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 1.5
    solver: str | None = None
    block: tuple[int, ...] | None = None
    blocks: int | None = None
    keep: int = 0
    switches: tuple[tuple[int, int], ...] = ()
    given: Tensor | None = field(default=None, repr=False, compare=False)

    def settings(self) -> dict[str, Any]:
        """Everything but the upload, as JSON."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "given"}


@dataclass(frozen=True)
class TextRequest:
    """Texts; see `ACDiTTextPipeline` for the settings."""

    model: str
    prompt: str = ""
    new_tokens: int | None = None
    samples: int = 1
    seed: int = 0
    sampler: str = "first_hitting"
    steps: int = 64
    threshold: float = 0.9
    temperature: float = 1.0
    top_p: float = 1.0

    def settings(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return dataclasses.asdict(self)


Request = SampleRequest | TextRequest


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high]; numbers of JSON such as 25.0 count as 25.

    Raises:
        ConfigError: anything else, text and booleans included.
    """
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or (isinstance(value, float) and not (math.isfinite(value) and value == int(value))):
        raise ConfigError(name, found=f"{value!r:.40}", expected=f"a whole number, {low} … {high}")
    if not low <= value <= high:
        found = str(value) if abs(value) < 1e18 else f"a number of {len(str(int(abs(value))))} digits"
        raise ConfigError(name, found=found, expected=f"a whole number, {low} … {high}")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high].

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is in no range
        raise ConfigError(name, found=f"{value!r:.40}", expected=f"a number, {low:g} … {high:g}")
    return float(value)


def choice(name: str, value: Any, among: tuple[str, ...]) -> str:
    """One of a few words.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, str) or value not in among:
        raise ConfigError(name, found=f"{value!r:.60}", expected=f"one of {', '.join(among)}")
    return value


def checked_text(request: TextRequest, limits: Limits) -> TextRequest:
    """A request of text with every field bounded; what depends on the tokenizer is left to its model.

    Raises:
        ConfigError: a field out of its bounds.
    """
    if not isinstance(request.prompt, str) or len(request.prompt) > limits.prompt:
        size = len(request.prompt) if isinstance(request.prompt, str) else type(request.prompt).__name__
        raise ConfigError("prompt", found=f"{size} characters", expected=f"text of at most {limits.prompt}")
    new = request.new_tokens
    return TextRequest(
        model=request.model,
        prompt=request.prompt,
        new_tokens=None if new is None else whole("new_tokens", new, 1, limits.new_tokens),
        samples=whole("samples", request.samples, 1, limits.samples),
        seed=whole("seed", request.seed, 0, LARGEST_SEED),
        sampler=choice("sampler", request.sampler, SAMPLERS),
        steps=whole("steps", request.steps, 1, limits.steps),
        threshold=number("threshold", request.threshold, 0.0, 1.0),
        temperature=number("temperature", request.temperature, 0.0, 10.0),
        top_p=number("top_p", request.top_p, 1e-3, 1.0),
    )
