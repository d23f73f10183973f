"""What a step trains on: a pure function of recipe, step and position in the global batch.

One process, several processes, accumulation and a resumed run see the same samples, timesteps, noise, flips and
dropped labels, because every draw is keyed by (seed, stream, step, position in the global batch, copy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from acdit import draws
from acdit.codecs import TokenIdsCodec, VAECodec
from acdit.codecs.pixels import shift_pictures
from acdit.corruption import MaskingCorruption
from acdit.data.bad_files import BadFiles
from acdit.data.build import Dataset, length
from acdit.data.clips import ClipsDataset
from acdit.data.picture import CROP_DRAWS
from acdit.data.stream import StreamDataset
from acdit.errors import AcditError, DataError
from acdit.processes import Processes
from acdit.training.build import Built
from acdit.training.self_context import own_context


@dataclass
class Batch:
    """Everything a micro-batch's loss depends on."""

    clean: Tensor
    """(B, N, L, D); of text (B, N, L), as all that follow have one axis less"""
    context: Tensor
    """(B, N, L, D), what the clean slots hold: `clean` itself, its corruption with `corruption.context_noise`, or what
    the model makes of it with `corruption.self_context`"""
    noise: Tensor
    """(B, C, N, L, D)"""
    timestep: Tensor
    """(B, C, N)"""
    labels: Tensor | None
    """(B,), dropped ones already replaced by the null label"""


class DataOrder:
    """The endless order of samples: one keyed permutation an epoch, one after the other.

    Args:
        length: samples in the data set.
        seed: of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def indices(self, start: int, count: int) -> np.ndarray:
        """Data set indices at positions start … start + count − 1 of the endless order."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.length)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = draws.permutation(self.length, seed=self.seed, stream="order", step=epoch)
            part = self._permutation[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)


class Batches:
    """Micro-batches of one process, step by step.

    Args:
        built: the run's objects.
        rank, world_size: this process; each takes a contiguous part of every global batch.
        first_step: where to begin.
        device: where batches go.
    """

    def __init__(self, built: Built, rank: int, world_size: int, first_step: int, device: torch.device) -> None:
        self.built, self.device, self.first_step = built, device, first_step
        if isinstance(built.codec, VAECodec):  # pictures are encoded at every step
            built.codec.vae.to(device)
        optim = built.recipe.optim
        self._in_memory = isinstance(getattr(built.dataset, "images", None), Tensor)
        samples = length(built.dataset)
        self.order = None if samples is None else DataOrder(samples, built.recipe.seed)
        """None: the stream has its own order."""
        self.micro_batch = optim.batch_size // (optim.accumulation * world_size)
        start = rank * optim.accumulation * self.micro_batch
        self.positions = [
            range(start + i * self.micro_batch, start + (i + 1) * self.micro_batch) for i in range(optim.accumulation)
        ]
        """Positions in the global batch, a range per micro-batch."""
        # Without a group the positions of several processes can be looked at in one: nobody else has to agree.
        self._peers = Processes(rank, world_size) if torch.distributed.is_initialized() else Processes()
        own = getattr(built.dataset, "bad_files", None)
        known = (own.reasons, own.what) if own is not None else ()
        self.bad_files = BadFiles(built.recipe.data.max_bad_files, *known)
        """What all loader workers of all processes have met, up to the step that was handed out last."""

    def __iter__(self) -> Iterator[list[Any]]:
        """One list of micro-batches (`Batch`) per step, for ever."""
        if isinstance(self.built.dataset, StreamDataset):
            loaded = self._from_stream(self.built.dataset)
        elif self._in_memory:
            loaded = self._from_memory()
        else:
            loaded = self._from_files()
        step = self.first_step
        while True:
            parts = self._agreed([next(loaded) for _ in self.positions])
            yield [self._batch(step, positions, *part) for positions, part in zip(self.positions, parts, strict=True)]
            step += 1

    def _wanted(self) -> Iterator[list[_Place]]:
        """Every sample's index, where to crop it and where its clip begins, a list per micro-batch."""
        recipe, step = self.built.recipe, self.first_step
        while True:
            for positions in self.positions:
                start = step * recipe.optim.batch_size + positions.start
                indices = list(range(start, start + len(positions)))
                if self.order is not None:
                    indices = self.order.indices(start, len(positions)).tolist()
                key: dict[str, Any] = {"seed": recipe.seed, "step": step, "samples": positions}
                crops: list[list[float] | None] = [None] * len(indices)
                if recipe.data.crop == "random":
                    crops = draws.uniform((CROP_DRAWS,), stream="crop", **key).tolist()
                starts: list[float | None] = [None] * len(indices)
                if recipe.data.kind == "clips" and recipe.data.start == "random":
                    starts = draws.uniform((), stream="start", **key).tolist()
                yield [_Place(*found) for found in zip(indices, crops, starts, strict=True)]
            step += 1

    def _from_memory(self) -> Iterator[_Loaded]:
        # A data set that holds its images holds its labels too: the protocol asks for neither.
        dataset: Any = self.built.dataset
        labels = torch.as_tensor(dataset.labels)
        for wanted in self._wanted():
            indices = [place.sample for place in wanted]
            yield _Loaded(dataset.images[indices], labels[indices])

    def _from_files(self) -> Iterator[_Loaded]:
        return iter(
            DataLoader(
                _Indexed(self.built.dataset),
                batch_sampler=self._wanted(),
                num_workers=self.built.recipe.data.num_workers,
                collate_fn=_as_it_is,
            )
        )

    def _from_stream(self, dataset: StreamDataset) -> Iterator[_Loaded]:
        dataset.start(self.built.recipe.seed, history=2 * self.built.recipe.optim.batch_size)
        load = _Indexed(dataset).__getitems__
        if not self.built.recipe.data.num_workers:
            yield from map(load, self._wanted())
            return
        with ThreadPoolExecutor(1) as reader:  # one micro-batch ahead
            waiting: list[Future[_Loaded]] = []
            for wanted in self._wanted():
                waiting.append(reader.submit(load, wanted))
                if len(waiting) > 1:
                    yield waiting.pop(0).result()

    def _agreed(self, parts: list[_Loaded]) -> list[tuple[Tensor, Tensor]]:
        """What was loaded, once all processes know of all bad files, so that they stop together or not at all.

        Raises:
            DataError: more bad files than allowed in all processes together, or any other error of the data set.
        """
        news = {name: reason for part in parts for name, reason in part.bad_files.items()}
        error = next((part.error for part in parts if part.error is not None), None)
        if not self._in_memory and self._peers.any(bool(news) or error is not None):  # rarely: names travel only then
            told = self._peers.gather((news, None if error is None else str(error)))
            news = {name: reason for names, _ in told for name, reason in names.items()}
            if error is None and (message := next((text for _, text in told if text is not None), None)):
                error = DataError(f"another process: {message}")
        for name, reason in news.items():
            self.bad_files.add(name, reason)
        if error is not None:
            raise error
        return [(part.pictures, part.labels) for part in parts]

    def _clean(self, pictures: Tensor, key: dict[str, Any]) -> Tensor:
        """Flipped, shifted, encoded and cut into blocks: (B, N, L, D)."""
        built = self.built
        if built.recipe.data.flip and not isinstance(built.codec, TokenIdsCodec):
            flipped = draws.uniform((), stream="flip", **key) < 0.5
            pictures = built.codec.flip(pictures, flipped)
        reach = built.recipe.data.shift
        if reach:
            drawn = draws.uniform((2,), stream="shift", **key) * (2 * reach + 1)
            pictures = shift_pictures(pictures, drawn.floor().long() - reach)
        shape = built.codec.noise_shape(built.dataset.shape)
        posterior = None if shape is None else draws.normal(shape, stream="posterior", **key)
        return built.model.layout.to_blocks(built.codec.encode(pictures, posterior))

    def _batch(self, step: int, positions: range, pictures: Tensor, labels: Tensor) -> Any:
        built, recipe = self.built, self.built.recipe
        layout, copies = built.model.layout, recipe.corruption.copies
        key: dict[str, Any] = {"seed": recipe.seed, "step": step, "samples": positions}
        dtype = built.model.x_embedder.weight.dtype
        clean = self._clean(pictures, key)
        if isinstance(built.corruption, MaskingCorruption):
            noise = draws.uniform(tuple(clean.shape[1:]), stream="noise", copies=copies, **key)
        else:
            clean = clean.to(dtype)
            noise = draws.normal(tuple(clean.shape[1:]), stream="noise", copies=copies, **key).to(dtype)
        if isinstance(built.corruption, MaskingCorruption) and recipe.corruption.low_discrepancy:
            size = recipe.optim.batch_size
            u = draws.low_discrepancy(layout.num_blocks, stream="timestep", batch_size=size, copies=copies, **key)
        else:
            u = draws.uniform((layout.num_blocks,), stream="timestep", copies=copies, **key)
        kept: Tensor | None = None
        if built.model.null_label is not None:
            dropped = draws.uniform((), stream="label_dropout", **key) < recipe.optim.label_dropout
            kept = torch.where(dropped, built.model.null_label, labels).to(self.device)
        clean = clean.to(self.device)
        return Batch(
            clean=clean,
            context=self._context(clean, kept, key),
            noise=noise.to(self.device),
            timestep=built.corruption.timesteps(u).to(self.device),
            labels=kept,
        )

    def _context(self, clean: Tensor, labels: Tensor | None, key: dict[str, Any]) -> Tensor:
        """The clean blocks, or each one's corruption at a timestep and with noise of its own (streams of their own, so
        that the noisy copies see the draws they would see without), or what the model makes of them."""
        settings = self.built.recipe.corruption
        corruption = self.built.corruption
        if isinstance(corruption, MaskingCorruption):
            return clean
        if settings.self_context:
            return own_context(
                self.built.model, corruption, clean, labels, share=settings.self_context,
                steps=settings.self_context_steps, strength=settings.self_context_strength, key=key,
            )  # fmt: skip
        level = settings.context_noise
        if level == 0:
            return clean
        u = draws.uniform((clean.shape[1],), stream="context_timestep", **key)
        noise = draws.normal(tuple(clean.shape[1:]), stream="context_noise", **key).to(clean.dtype)
        timestep = corruption.uniform_timesteps(level * u).to(self.device)
        return corruption.corrupt(clean, noise.to(self.device), timestep)


@dataclass(frozen=True)
class _Place:
    """Which sample, and the draws of what is random about it."""

    sample: int
    crop: Sequence[float] | None
    start: float | None
    """Of a clip: where in its file it begins."""


@dataclass
class _Loaded:
    """A micro-batch from a loader. Errors and bad files travel as values: raised in a worker, torch would put the
    worker's whole traceback into the message that the user reads; counted in a worker, nobody would know the sum."""

    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    bad_files: dict[str, str] = field(default_factory=dict)
    """Met by this worker since its last micro-batch, with reasons."""
    error: AcditError | None = None


class _Indexed(torch.utils.data.Dataset[_Loaded]):
    """The data set as torch's loader wants it; module level, so that workers can be started by any method."""

    def __init__(self, dataset: Dataset | StreamDataset) -> None:
        self.dataset: Any = dataset
        self._bad_files: BadFiles = getattr(dataset, "bad_files", BadFiles(0))
        self._reported = len(self._bad_files)

    def __getitems__(self, wanted: list[_Place]) -> _Loaded:
        loaded = _Loaded()
        try:
            if isinstance(self.dataset, StreamDataset):
                samples = self.dataset.samples([(place.sample, place.crop) for place in wanted])
            else:
                samples = [self._sample(place) for place in wanted]
            loaded.pictures = torch.stack([picture for picture, _ in samples])
            loaded.labels = torch.tensor([label for _, label in samples])
        except AcditError as error:
            loaded.error = error
        loaded.bad_files = self._bad_files.since(self._reported)
        self._reported = len(self._bad_files)
        return loaded

    def _sample(self, place: _Place) -> tuple[Tensor, int]:
        sample: tuple[Tensor, int]
        if isinstance(self.dataset, ClipsDataset):
            sample = self.dataset.placed(place.sample, place.crop, place.start)
        else:
            index, crop = place.sample, place.crop
            sample = self.dataset[index] if crop is None else self.dataset.cropped(index, crop)
        return sample

    def __len__(self) -> int:
        return len(self.dataset)


def _as_it_is(loaded: Any) -> Any:
    return loaded
