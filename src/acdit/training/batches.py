"""What a step trains on: a pure function of recipe, step and position in the global batch.

One process, several processes, accumulation and a resumed run see the same samples, timesteps, noise, flips and
dropped labels, because every draw is keyed by (seed, stream, step, position in the global batch, copy).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from acdit import draws
from acdit.codecs import VAECodec
from acdit.data.build import Dataset
from acdit.errors import AcditError
from acdit.training.build import Built


@dataclass
class Batch:
    """Everything a micro-batch's loss depends on."""

    clean: Tensor
    """(B, N, L, D)"""
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
        self.order = DataOrder(len(built.dataset), built.recipe.seed)
        optim = built.recipe.optim
        self.micro_batch = optim.batch_size // (optim.accumulation * world_size)
        start = rank * optim.accumulation * self.micro_batch
        self.positions = [
            range(start + i * self.micro_batch, start + (i + 1) * self.micro_batch) for i in range(optim.accumulation)
        ]
        """Positions in the global batch, a range per micro-batch."""

    def __iter__(self) -> Iterator[list[Batch]]:
        """One list of micro-batches per step, for ever."""
        pictures = self._pictures()
        step = self.first_step
        while True:
            yield [self._batch(step, positions, *next(pictures)) for positions in self.positions]
            step += 1

    def _indices(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for positions in self.positions:
                start = step * self.built.recipe.optim.batch_size + positions.start
                yield self.order.indices(start, len(positions)).tolist()
            step += 1

    def _pictures(self) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = self.built.dataset
        in_memory = getattr(dataset, "images", None)
        if isinstance(in_memory, Tensor):
            # A data set that holds its images holds its labels too: the protocol asks for neither.
            labels = torch.as_tensor(dataset.labels)  # type: ignore[attr-defined]
            return ((in_memory[indices], labels[indices]) for indices in self._indices())
        loader = DataLoader(
            _Indexed(dataset),
            batch_sampler=self._indices(),
            num_workers=self.built.recipe.data.num_workers,
            collate_fn=_collate,
        )
        return (_raised(loaded) for loaded in loader)

    def _batch(self, step: int, positions: range, pictures: Tensor, labels: Tensor) -> Batch:
        built, recipe = self.built, self.built.recipe
        layout, copies = built.model.layout, recipe.corruption.copies
        key: dict[str, Any] = {"seed": recipe.seed, "step": step, "samples": positions}
        if recipe.data.flip:
            flipped = draws.uniform((), stream="flip", **key) < 0.5
            pictures = built.codec.flip(pictures, flipped)
        dtype = built.model.x_embedder.weight.dtype
        shape = built.codec.noise_shape(built.dataset.shape)
        posterior = None if shape is None else draws.normal(shape, stream="posterior", **key)
        clean = layout.to_blocks(built.codec.encode(pictures, posterior)).to(dtype)
        u = draws.uniform((layout.num_blocks,), stream="timestep", copies=copies, **key)
        noise = draws.normal(tuple(clean.shape[1:]), stream="noise", copies=copies, **key).to(dtype)
        kept: Tensor | None = None
        if built.model.null_label is not None:
            dropped = draws.uniform((), stream="label_dropout", **key) < recipe.optim.label_dropout
            kept = torch.where(dropped, built.model.null_label, labels).to(self.device)
        return Batch(
            clean=clean.to(self.device),
            noise=noise.to(self.device),
            timestep=built.corruption.timesteps(u).to(self.device),
            labels=kept,
        )


class _Indexed(torch.utils.data.Dataset[tuple[Tensor, int] | AcditError]):
    """The data set as torch's loader wants it; module level, so that workers can be started by any method.

    An error of the data set is handed over as a value: raised in a worker, torch would put the worker's whole traceback
    into the message that the user reads.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | AcditError:
        try:
            return self.dataset[index]
        except AcditError as error:
            return error

    def __len__(self) -> int:
        return len(self.dataset)


def _collate(items: list[tuple[Tensor, int] | AcditError]) -> tuple[Tensor, Tensor] | AcditError:
    pictures, labels = [], []
    for item in items:
        if isinstance(item, AcditError):
            return item
        pictures.append(item[0])
        labels.append(item[1])
    return torch.stack(pictures), torch.tensor(labels)


def _raised(loaded: tuple[Tensor, Tensor] | AcditError) -> tuple[Tensor, Tensor]:
    if isinstance(loaded, AcditError):
        raise loaded
    return loaded
