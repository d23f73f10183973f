"""Pictures and clips of a batch of requests: the library's own loop, a block at a time.

`sample_blocks` is asked for one block after another, with one cache and one generator a sample, as `acdit.streaming`
does. So labels can change between blocks, and the result is that of one call for all. A request that is cancelled
leaves the batch after the step at work: its samples are computed no further, and their share of the cache is freed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acdit.app.events import Cancelled, Done, Picture, Ticket
from acdit.app.models import ServedModel
from acdit.app.requests import SampleRequest
from acdit.cache import KVCache
from acdit.errors import ConfigError, NonFiniteError
from acdit.layout import BlockLayout
from acdit.sampling import DenoisingStep, Staying, generators_from_seed, sample_blocks

PREVIEW_SECONDS = 0.08
"""At least so long between two previews of one block; the first and the last step are always shown."""
PREVIEW_SHARE = 4
"""A preview waits so many times as long as the one before took: an autoencoder does not slow the denoising down."""


class Stopped(Exception):
    """Nobody wants the batch any more."""


@dataclass
class _Job:
    """A request in a batch."""

    ticket: Ticket
    request: SampleRequest
    rows: slice
    """Its samples in the batch."""
    labels: list[int | None]
    """Of every block so far; of kept ones None."""


class Canvas:
    """Blocks of a request in pixels, a step of time at once.

    Args:
        served: the model.
        layout: its layout, with the asked block.
    """

    def __init__(self, served: ServedModel, layout: BlockLayout) -> None:
        self._codec, self._layout = served.pipeline.codec, layout
        self._a_step = served.blocks_a_step
        if served.kind == "image":
            self._a_step, self._step_layout = layout.num_blocks, layout
        else:
            grid = (layout.block[0] * layout.patch[0], *layout.grid[1:])
            self._step_layout = BlockLayout(grid, layout.block, layout.patch)

    @property
    def blocks_a_step(self) -> int:
        """Blocks that are decoded together."""
        return self._a_step

    def encode(self, given: Tensor, blocks: int, device: torch.device) -> Tensor:
        """The first blocks (1, n, L, D) of what was uploaded, uint8 (C, T, H, W)."""
        if self._layout.ndim == 2:
            return self._layout.to_blocks(self._codec.encode(given[None, :, 0].to(device)))[:, :blocks]
        steps = -(-blocks // self._a_step)
        layout = BlockLayout(
            (steps * self._step_layout.grid[0], *self._layout.grid[1:]), self._layout.block, self._layout.patch
        )
        if given.shape[1] < layout.grid[0]:
            raise ConfigError("upload", found=f"{given.shape[1]} frames", expected=f"{layout.grid[0]}", fix="keep less")
        return layout.to_blocks(self._codec.encode(given[None, :, : layout.grid[0]].to(device)))[:, :blocks]

    def pixels(self, blocks: Sequence[Tensor]) -> Tensor:
        """uint8 (B, C, T, H, W) of one step of time from its first blocks, (B, L, D) each; the others are empty.

        Raises:
            NonFiniteError: NaN or infinite values.
        """
        empty = torch.zeros_like(blocks[0])
        tokens = torch.stack([*blocks, *[empty] * (self._a_step - len(blocks))], dim=1)
        pixels = self._codec.decode(self._step_layout.from_blocks(tokens))
        if not bool(pixels.isfinite().all()):
            raise NonFiniteError(
                "picture", found="NaN or infinite values", expected="finite ones",
                fix="a lower guidance scale, more steps, or another solver",
            )  # fmt: skip
        pixels = pixels[:, :, None] if pixels.ndim == 4 else pixels
        return (pixels.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def draw(served: ServedModel, tickets: Sequence[Ticket], register: Callable[[KVCache], None]) -> None:
    """Denoise the requests of `tickets`, which share all settings but label, seed and number, as one batch.

    Args:
        served: their model.
        tickets: with checked `SampleRequest`s; one with an upload is alone.
        register: told of every cache that is made.

    Raises:
        Stopped: all were cancelled; each has been told.
        AcditError: a fault of the model or its settings; nobody has been told.
    """
    _Drawing(served, tickets, register).run()


class _Drawing:
    def __init__(self, served: ServedModel, tickets: Sequence[Ticket], register: Callable[[KVCache], None]) -> None:
        self._register = register
        self._jobs: list[_Job] = []
        rows = 0
        for ticket in tickets:
            request = ticket.request
            assert isinstance(request, SampleRequest)
            self._jobs.append(_Job(ticket, request, slice(rows, rows + request.samples), [None] * request.keep))
            rows += request.samples
        self._first = self._jobs[0].request
        self._model = served.transformer(self._first.block)
        self._scheduler = served.scheduler(self._first.solver)
        self._canvas = Canvas(served, self._model.layout)
        self._generators = [
            one for job in self._jobs for one in generators_from_seed(job.request.seed, job.request.samples)
        ]
        self._total = self._first.blocks or self._model.layout.num_blocks
        self._batch = rows
        self._finished: list[Tensor] = []
        """(B, L, D) blocks of the step of time at work, or of the picture."""
        self._steps: list[Tensor] = []
        """uint8 pixels of the steps of time that are finished."""
        self._done, self._all = 0, (self._total - self._first.keep) * self._first.steps
        self._started = self._shown = time.monotonic()
        self._preview_took = 0.0

    def run(self) -> None:
        cache = self._begin()
        last: Tensor | None = None
        for block in range(self._first.keep, self._total):
            for job in self._jobs:
                for label in (to for at, to in job.request.switches if at == block):
                    job.ticket.switch(label)
                job.labels.append(job.ticket.label)
            (last,) = sample_blocks(
                self._model,
                self._scheduler,
                class_labels=self._labels(),
                batch_size=self._batch,
                num_inference_steps=self._first.steps,
                guidance_scale=self._first.guidance,
                prefix=None if last is None else last[:, None],
                cache=cache,
                num_blocks=1,
                generator=self._generators,
                on_step=self._on_step,
            )
            self._finish(block, last)
        self._end()

    def _begin(self) -> KVCache:
        """The cache of all samples; an upload is read once, and its cache forked."""
        keep, room = self._first.keep, max(1, self._total - 1)
        if self._first.given is None:
            cache = self._model.new_cache(self._batch, room)
            self._register(cache)
            return cache
        given = self._canvas.encode(self._first.given, keep, self._model.execution_device)
        past = self._model.new_cache(1, room)
        self._register(past)
        with torch.no_grad():
            self._model.prefill(given.to(self._model.x_embedder.weight.dtype), past)
        cache = past.fork(self._batch)
        self._register(cache)
        for block in given.expand(self._batch, -1, -1, -1).unbind(1):
            self._add(block)
        return cache

    def _labels(self) -> list[int] | None:
        labels = [label for job in self._jobs for label in [job.labels[-1]] * job.request.samples]
        return None if None in labels else [label for label in labels if label is not None]

    def _on_step(self, state: DenoisingStep) -> Staying | None:
        self._done += 1
        staying = self._leave()
        now = time.monotonic()
        wait = max(PREVIEW_SECONDS, PREVIEW_SHARE * self._preview_took)
        if state.step in (0, state.num_steps - 1) or now - self._shown >= wait:
            estimate = state.estimate()
            estimate = estimate if staying is None else estimate[list(staying.samples)]
            pixels = self._canvas.pixels([*self._finished, estimate])
            self._shown = time.monotonic()
            self._preview_took = self._shown - now
            self._tell(self._jobs, pixels, state.block, False, state.step + 1)
        return staying

    @staticmethod
    def _stops(job: _Job) -> bool:
        """Whether the request was cancelled; it is told at once."""
        why = job.ticket.cancelled
        if why is not None:
            job.ticket.put(Cancelled(why))
        return why is not None

    def _leave(self) -> Staying | None:
        """Take cancelled requests' samples out of the batch; None: there are none.

        Raises:
            Stopped: nobody stays.
        """
        staying = [job for job in self._jobs if not self._stops(job)]
        if len(staying) == len(self._jobs):
            return None
        if not staying:
            raise Stopped
        rows = [row for job in staying for row in range(self._batch)[job.rows]]
        self._generators = [self._generators[row] for row in rows]
        self._finished = [block[rows] for block in self._finished]
        self._steps = [pixels[rows] for pixels in self._steps]
        start = 0
        for job in staying:
            job.rows = slice(start, start + job.request.samples)
            start += job.request.samples
        self._jobs, self._batch = staying, start
        return Staying(rows)

    def _add(self, block: Tensor) -> Tensor | None:
        """One more finished block; the pixels of its step of time once that is whole."""
        self._finished.append(block)
        if len(self._finished) < self._canvas.blocks_a_step:
            return None
        pixels = self._canvas.pixels(self._finished)
        self._steps.append(pixels)
        self._finished = []
        return pixels

    def _finish(self, block: int, tokens: Tensor) -> None:
        shown = self._add(tokens)
        shown = self._canvas.pixels(self._finished) if shown is None else shown
        self._tell([job for job in self._jobs if not self._stops(job)], shown, block, True, self._first.steps)

    def _tell(self, jobs: Iterable[_Job], pixels: Tensor, block: int, finished: bool, step: int) -> None:
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._all - self._done) if self._done else math.nan
        for job in jobs:
            job.ticket.put(
                Picture(
                    frames=pixels[job.rows].clone(), block=block, finished=finished, step=step,
                    steps=self._first.steps, labels=tuple(job.labels), done=self._done, total=self._all,
                    seconds_left=left,
                )
            )  # fmt: skip

    def _end(self) -> None:
        frames, seconds = torch.cat(self._steps, dim=2), time.monotonic() - self._started
        for job in self._jobs:
            if not self._stops(job):
                job.ticket.put(
                    Done(
                        frames=frames[job.rows].clone(), texts=(), labels=tuple(job.labels),
                        settings={**job.request.settings(), "switches": _switches(job)}, seconds=seconds,
                        batch=self._batch,
                    )
                )  # fmt: skip


def _switches(job: _Job) -> list[list[int]]:
    """[block, label] of every change of class there was, so that settings make the same result again."""
    labels = job.labels[job.request.keep :]
    before = [job.request.label, *labels]
    return [
        [job.request.keep + index, label]
        for index, label in enumerate(labels)
        if label is not None and label != before[index]
    ]
