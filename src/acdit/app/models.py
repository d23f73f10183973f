"""A model as it is served: what may be asked of it, and its weights under blocks of other sizes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from acdit.app.requests import LARGEST_SEED, Limits, SampleRequest, choice, number, whole
from acdit.costs import Architecture
from acdit.errors import ConfigError
from acdit.layout import BlockLayout
from acdit.model import ACDiTTransformer
from acdit.pipelines import ACDiTPipeline
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.solvers import fitting_solvers, make_solver

KINDS = ("image", "video", "text")


class ServedModel:
    """A pipeline with a name.

    Args:
        name: what requests call it.
        pipeline: pictures, clips or text; of latents only with its autoencoder.

    Raises:
        ConfigError: a model whose samples cannot be shown.
    """

    def __init__(self, name: str, pipeline: ACDiTPipeline | ACDiTTextPipeline) -> None:
        self.name, self.pipeline = name, pipeline
        model = pipeline.transformer
        if isinstance(pipeline, ACDiTTextPipeline):
            self.kind = "text"
            if pipeline.tokenizer is None:
                raise ConfigError(f"model {name}", found="no tokenizer", expected="one: text is shown as text")
        elif model.layout.ndim in (2, 3):
            self.kind = "image" if model.layout.ndim == 2 else "video"
            pipeline._require_codec()
        else:
            raise ConfigError(f"model {name}", found=f"{model.layout.ndim}-D data", expected="pictures, clips or text")
        self._variants: dict[tuple[int, ...], ACDiTTransformer] = {model.layout.block: model}
        self._lock = threading.Lock()

    @property
    def layout(self) -> BlockLayout:
        """The model's own."""
        return self.pipeline.transformer.layout

    @property
    def num_classes(self) -> int | None:
        """None of an unconditional model."""
        classes = self.pipeline.transformer.config.num_classes
        return None if classes is None else int(classes)

    @property
    def class_names(self) -> list[tuple[str, int]]:
        """(name, index) of every class."""
        names = self.pipeline.config.get("id2label") or {}
        return [(str(names.get(str(index), index)), index) for index in range(self.num_classes or 0)]

    @property
    def solvers(self) -> tuple[str, ...]:
        """Names of the solvers that fit; none of text."""
        return () if self.kind == "text" else fitting_solvers(self.pipeline.scheduler)

    @property
    def endless(self) -> bool:
        """Whether clips may go on beyond the grid: under a window."""
        return self.kind == "video" and self.pipeline.transformer.window is not None

    @property
    def blocks_a_step(self) -> int:
        """Blocks of one step of time of a clip; 1 of anything else."""
        return self.layout.num_blocks // self.layout.block_grid[0] if self.kind == "video" else 1

    def block_choices(self, most_blocks: int) -> list[tuple[int, ...]]:
        """Block sizes that may be asked for: of pictures those of the token grid's shape, beside the model's own.

        A window counts blocks, so with one the size stays.
        """
        own, tokens = self.layout.block, self.layout.token_grid
        if self.kind != "image" or self.pipeline.transformer.window is not None:
            return [own]
        parts = [
            n for n in range(1, min(tokens) + 1) if all(extent % n == 0 for extent in tokens) and n * n <= most_blocks
        ]
        return sorted({own, *(tuple(extent // n for extent in tokens) for n in parts)})

    def transformer(self, block: Sequence[int] | None) -> ACDiTTransformer:
        """The model with blocks of a size of `block_choices`; all sizes share one set of weights."""
        wanted = self.layout.block if block is None else tuple(block)
        with self._lock:
            if wanted not in self._variants:
                own = self.pipeline.transformer
                settings = {key: value for key, value in own.config.items() if not key.startswith("_")}
                with torch.device("meta"):
                    other = ACDiTTransformer(**{**settings, "block": list(wanted)})
                other.load_state_dict(own.state_dict(), assign=True)
                self._variants[wanted] = other.eval()
            return self._variants[wanted]

    def scheduler(self, solver: str | None) -> Any:
        """The scheduler of a name of `solvers`; None: the model's own."""
        return self.pipeline.scheduler if solver is None else make_solver(self.pipeline.scheduler, solver)

    def cache_bytes(self, request: SampleRequest) -> int:
        """Bytes of keys and values that a checked request will hold."""
        arch = Architecture.of({**self.pipeline.transformer.config, "block": request.block or self.layout.block})
        total = request.blocks or arch.layout.num_blocks
        kept = total - 1 if arch.window is None else arch.window.capacity + 1
        size = self.pipeline.transformer.x_embedder.weight.element_size()
        return 2 * request.samples * kept * arch.layout.block_tokens * arch.width * arch.num_layers * size

    def checked(self, request: SampleRequest, limits: Limits) -> SampleRequest:
        """The request with every field bounded and every default filled in.

        Raises:
            ConfigError: a field out of its bounds.
        """
        trained = getattr(self.pipeline.scheduler.config, "num_train_timesteps", limits.steps)
        block = self._block(request.block, limits)
        own = BlockLayout(self.layout.grid, block, self.layout.patch).num_blocks
        a_step = self.blocks_a_step
        blocks = own if request.blocks is None else whole("blocks", request.blocks, a_step, limits.blocks)
        if (blocks > own and not self.endless) or blocks % a_step or (self.kind == "image" and blocks != own):
            most = limits.blocks if self.endless else own
            fine = str(own) if self.kind == "image" else f"a multiple of {a_step}, at most {most}"
            raise ConfigError("blocks", found=str(blocks), expected=fine)
        keep = whole("keep", request.keep, 0, blocks - 1)
        if (keep > 0) != (request.given is not None):
            raise ConfigError(
                "keep", found=f"{keep} and {'no' if request.given is None else 'an'} upload", expected="both or neither"
            )
        if keep % a_step:
            raise ConfigError("keep", found=str(keep), expected=f"a multiple of {a_step}, the blocks of a step of time")
        result = SampleRequest(
            model=self.name,
            label=self.checked_label(request.label),
            samples=whole("samples", request.samples, 1, limits.samples),
            seed=whole("seed", request.seed, 0, LARGEST_SEED),
            steps=whole("steps", request.steps, 1, min(limits.steps, trained)),
            guidance=number("guidance", request.guidance, 0.0, limits.guidance) if self.num_classes else 1.0,
            solver=None if request.solver is None else choice("solver", request.solver, self.solvers),
            block=block,
            blocks=blocks,
            keep=keep,
            switches=self._switches(request.switches, blocks),
            given=request.given,
        )
        needed = self.cache_bytes(result)
        if needed > limits.cache_bytes:
            raise ConfigError(
                "request", found=f"{needed / 2**20:.0f} MiB of cache", expected=f"at most {limits.cache_bytes >> 20}",
                fix="fewer samples or fewer blocks",
            )  # fmt: skip
        return result

    def checked_label(self, label: Any) -> int | None:
        """A class of this model; None: the first, or none of an unconditional one.

        Raises:
            ConfigError: another.
        """
        if self.num_classes is None:
            if label is not None:
                raise ConfigError("label", found=f"{label!r:.40}", expected="none: this model is unconditional")
            return None
        return whole("label", 0 if label is None else label, 0, self.num_classes - 1)

    def _switches(self, switches: Any, blocks: int) -> tuple[tuple[int, int], ...]:
        fine = isinstance(switches, list | tuple) and len(switches) <= blocks
        if not fine or not all(isinstance(one, list | tuple) and len(one) == 2 for one in switches):
            raise ConfigError("switches", found=f"{switches!r:.40}", expected="pairs of a block and a label")
        if switches and self.num_classes is None:
            raise ConfigError("switches", found=f"{len(switches)}", expected="none: this model is unconditional")
        most = (self.num_classes or 1) - 1
        return tuple((whole("switches", at, 0, blocks - 1), whole("switches", to, 0, most)) for at, to in switches)

    def _block(self, block: Any, limits: Limits) -> tuple[int, ...]:
        choices = self.block_choices(limits.blocks)
        if block is None:
            return self.layout.block
        wanted = tuple(block) if isinstance(block, list | tuple) else block
        if wanted not in choices:
            named = ", ".join("×".join(map(str, one)) for one in choices)
            raise ConfigError("block", found=f"{block!r:.40}", expected=f"one of {named}")
        return tuple(int(size) for size in wanted)
