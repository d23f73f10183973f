"""Streams: a video that goes on for as long as asked, in constant memory, kept and taken up again to the bit.

A stream is a model, one cache and one generator of noise for each sample. Under a window (`acdit.mask.Window`, of the
model's training or asked for) the cache is a ring, so block number ten thousand takes the time and memory of block
number ten. What has to be kept to go on is the cache, the last block (it has not been read yet) and the generators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acdit import storage
from acdit.cache import KVCache
from acdit.errors import ConfigError, StorageError, first_line
from acdit.layout import BlockLayout
from acdit.mask import Window
from acdit.pipelines import ACDiTPipeline
from acdit.provenance import weights_sha256
from acdit.recipe import differing
from acdit.sampling import generators_from_seed, sample_blocks

_STATE = "state.safetensors"
_FACTS = "stream.json"


class Stream:
    """A video without an end.

    Args:
        pipeline: of a video model.
        labels: (B,) a class for each sample; None: an unconditional model. They may be set anew between blocks:
            `stream.labels = [5]`.
        batch_size: B of an unconditional model (default 1).
        num_inference_steps: solver steps a block.
        guidance_scale: 1 is off.
        seed: sample i draws from seed + i.
        window: what the model sees of the past; None: what it was trained with. A model without any keeps the whole
            past, and needs `max_blocks`.
        max_blocks: room for a model without a window.

    Raises:
        ConfigError: no video model, or neither a window nor `max_blocks`.
    """

    def __init__(
        self,
        pipeline: ACDiTPipeline,
        labels: Sequence[int] | None,
        *,
        batch_size: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        seed: int = 0,
        window: Window | None = None,
        max_blocks: int | None = None,
    ) -> None:
        model = pipeline.transformer
        if model.layout.ndim != 3:
            raise ConfigError("model", found=f"one of {model.layout.ndim}-D data", expected="a video model")
        self.pipeline, self.labels = pipeline, None if labels is None else list(labels)
        self.first_labels = self.labels
        self.num_inference_steps, self.seed = num_inference_steps, seed
        self.guidance_scale = guidance_scale if labels is not None else 1.0
        window = window or model.window
        if window is None and max_blocks is None:
            raise ConfigError(
                "stream", found="a model that was trained without a window", expected="a window, or a last block",
                fix="--window W forgets what is older (an experiment with such a model), or --blocks N keeps all",
            )  # fmt: skip
        batch = (batch_size or 1) if labels is None else len(labels)
        self._cache: KVCache = model.new_cache(batch, None if window else max_blocks, window)
        self._generators = generators_from_seed(seed, batch)
        self._last: Tensor | None = None
        self._step: list[Tensor] = []  # blocks of a time step that is not finished
        layout = model.layout
        self._blocks_a_step = layout.num_blocks // layout.block_grid[0]
        step = (layout.block[0] * layout.patch[0], *layout.grid[1:])
        self._step_layout = BlockLayout(step, layout.block, layout.patch)

    @property
    def num_blocks(self) -> int:
        """Blocks generated or given so far."""
        return self._cache.num_blocks + (self._last is not None)

    @property
    def batch_size(self) -> int:
        """B."""
        return self._cache.batch_size

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the cache: constant under a window."""
        return self._cache.nbytes

    def give(self, blocks: Tensor) -> None:
        """Start from given clean blocks (B or 1, n, L, D) in model space: whole steps of time.

        One past for all samples is read once, and its cache forked: several futures.

        Raises:
            ConfigError: the stream has begun, or blocks that are no whole steps.
        """
        if self.num_blocks or blocks.shape[1] % self._blocks_a_step or not blocks.shape[1]:
            raise ConfigError(
                "given blocks", found=f"{blocks.shape[1]} of them, {self.num_blocks} there already",
                expected=f"multiples of {self._blocks_a_step}, the blocks of a step of time, before the first one",
            )  # fmt: skip
        model = self.pipeline.transformer
        batch = self.batch_size
        shared = blocks.shape[0] == 1 and batch > 1
        cache = self._cache.like(1) if shared else self._cache
        if blocks.shape[1] > 1:
            with torch.no_grad():
                given = blocks[:, :-1].to(model.execution_device, model.x_embedder.weight.dtype)
                model.prefill(given, cache)
        self._cache = cache.fork(batch) if shared else cache
        self._last = blocks[:, -1].to(model.execution_device).expand(batch, -1, -1)

    def next_block(self) -> Tensor:
        """Generate one block, (B, L, D) in model space."""
        prefix = None if self._last is None else self._last[:, None]
        blocks = sample_blocks(
            self.pipeline.transformer,
            self.pipeline.scheduler,
            class_labels=self.labels,
            batch_size=self._cache.batch_size,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            prefix=prefix,
            cache=self._cache,
            num_blocks=1,
            generator=self._generators,
        )
        (self._last,) = blocks
        return self._last

    def frames(self, blocks: int) -> Iterator[Tensor]:
        """Generate so many blocks; pixels (B, T, C, H, W) in [0, 1] whenever a step of time is finished."""
        for _ in range(blocks):
            self._step.append(self.next_block())
            if len(self._step) == self._blocks_a_step:
                finished, self._step = torch.stack(self._step, dim=1), []
                yield self.decode(finished)

    def decode(self, blocks: Tensor) -> Tensor:
        """Blocks (B, n, L, D) of whole steps of time → frames (B, T, C, H, W) in [0, 1]."""
        steps = [
            self.pipeline.codec.decode(self._step_layout.from_blocks(part))
            for part in blocks.split(self._blocks_a_step, dim=1)
        ]
        return torch.cat(steps, dim=2).transpose(1, 2)

    # --- kept in files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write everything that going on needs, as one atomic directory."""
        tensors = {f"cache.{name}": tensor.contiguous() for name, tensor in self._cache.tensors().items()}
        tensors |= {f"noise.{index}": one.get_state() for index, one in enumerate(self._generators)}
        if self._last is not None:
            tensors["last"] = self._last.clone()
        tensors |= {f"step.{index}": block.clone() for index, block in enumerate(self._step)}
        facts = {"settings": self._settings(), "cache": self._cache.facts()}
        with storage.atomic_directory(folder) as directory:
            save_file(tensors, directory / _STATE)
            (directory / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote; this stream's model, solver and settings must be those of the kept one.

        Labels, steps and guidance may differ: they are what a user changes on the way.

        Raises:
            StorageError: damaged, or nothing there.
            ConfigError: of another model or other settings.
        """
        folder = Path(folder)
        storage.verify(folder)
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _STATE)
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{folder}", found=first_line(error), expected="a kept stream") from None
        changed = differing(facts["settings"], self._settings())
        if changed:
            listed = ", ".join(f"{key} was {old!s:.60}, is {new!s:.60}" for key, (old, new) in changed.items())
            raise ConfigError(f"{folder}", found=f"a stream of other settings: {listed}", expected="the same")
        device = self.pipeline.transformer.execution_device
        own = {name.removeprefix("cache."): one for name, one in tensors.items() if name.startswith("cache.")}
        self._cache.restore({name: one.to(device) for name, one in own.items()}, facts["cache"])
        for index, one in enumerate(self._generators):
            one.set_state(tensors[f"noise.{index}"])
        self._last = tensors["last"].to(device) if "last" in tensors else None
        self._step = [tensors[f"step.{index}"].to(device) for index in range(sum("step." in name for name in tensors))]

    def _settings(self) -> dict[str, Any]:
        model, window = self.pipeline.transformer, self._cache.window
        return {
            "model_sha256": weights_sha256(model),
            "block": list(model.layout.block),
            "dtype": str(model.dtype).removeprefix("torch."),
            "solver": type(self.pipeline.scheduler).__name__,
            "samples": self._cache.batch_size,
            "seed": self.seed,
            "window": None if window is None else [window.blocks, window.sinks, window.slide],
        }
