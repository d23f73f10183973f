"""What is analysed: a model's folder or a recipe, and the sizes its blocks could have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acdit.errors import ConfigError, StorageError, first_line
from acdit.flops import Architecture
from acdit.layout import BlockLayout
from acdit.model import ACDiTTransformer
from acdit.recipe import Recipe, load_recipe
from acdit.training.build import build_model


@dataclass(frozen=True)
class Subject:
    """An architecture with its name; weights play no part."""

    name: str
    config: dict[str, Any]
    """Of an `ACDiTTransformer`."""
    recipe: Recipe | None
    """None of a model's folder."""

    @property
    def architecture(self) -> Architecture:
        """What its cost depends on."""
        return Architecture.of(self.config)

    @property
    def layout(self) -> BlockLayout:
        """Grid, block and patch."""
        return self.architecture.layout

    @property
    def copies(self) -> int:
        """Noisy copies of a training step: the recipe's."""
        return 1 if self.recipe is None else self.recipe.corruption.copies

    @property
    def checkpointing(self) -> str:
        """Gradient checkpointing of a training step: the recipe's."""
        return "none" if self.recipe is None else self.recipe.train.gradient_checkpointing

    def with_block(self, block: Sequence[int]) -> Subject:
        """The same model with blocks of another size; it has the same weights."""
        return Subject(self.name, {**self.config, "block": list(block)}, self.recipe)

    def sampling(self, steps: int | None, guidance: bool) -> tuple[int, bool]:
        """Model calls a block, and whether both branches of guidance are computed.

        Args:
            steps: as asked; None: the recipe's or 25, of text one a token of a block.
            guidance: as asked, where the model has labels to guide with; a recipe may switch it off.
        """
        text = self.config.get("vocab_size") is not None
        usual = self.recipe.sampling.num_inference_steps if self.recipe is not None else 25
        wanted = self.recipe is None or self.recipe.sampling.guidance_scale != 1
        steps = steps or (self.layout.block_tokens if text else usual)
        return steps, guidance and wanted and self.config.get("num_classes") is not None

    def describe(self) -> dict[str, Any]:
        """Size and layout, as a result file names them."""
        arch, layout = self.architecture, self.layout
        window = arch.window
        return {
            "model": self.name,
            "parameters": arch.parameters,
            "num_layers": arch.num_layers,
            "hidden_size": arch.width,
            "num_attention_heads": arch.num_heads,
            "grid": list(layout.grid),
            "patch": list(layout.patch),
            "block": list(layout.block),
            "tokens": layout.num_tokens,
            "num_blocks": layout.num_blocks,
            "block_tokens": layout.block_tokens,
            "window": None if window is None else window.blocks,
            "sink_blocks": 0 if window is None else window.sinks,
        }


def load_subject(name: str, overrides: Sequence[str] = ()) -> Subject:
    """A folder of a pipeline or a transformer, else a recipe (a shipped one's name or a YAML path).

    Raises:
        ConfigError: neither; overrides of a model's folder; a recipe of text that leaves the vocabulary to its data.
        StorageError: a folder whose config cannot be read.
    """
    folder = Path(name)
    if folder.is_dir():
        if overrides:
            raise ConfigError(
                "MODEL", found=f"{overrides[0]} with a model's folder", expected="no key=value: a model is as it is",
                fix="name the recipe to change fields of",
            )  # fmt: skip
        inside = folder / "transformer"
        where = inside if inside.is_dir() else folder
        if not (where / "config.json").is_file():
            raise ConfigError(
                f"model {name}", found="no config.json there", expected="the folder of a saved pipeline or transformer",
                fix="train one (make demo leaves runs/demo/model), or name a recipe",
            )  # fmt: skip
        try:
            loaded: Any = ACDiTTransformer.load_config(where)
            with torch.device("meta"):
                config = dict(ACDiTTransformer.from_config(loaded).config)
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"model {name}", found=first_line(error), expected="an ACDiTTransformer's") from error
        return Subject(name, config, None)
    recipe = load_recipe(name, overrides)
    if recipe.corruption.kind == "masking" and recipe.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size", found="null, for the data to fill in", expected="a number: no data are read here",
            fix="add model.vocab_size=50257 (GPT-2's), or what `acdit data` shows",
        )  # fmt: skip
    with torch.device("meta"):
        config = dict(build_model(recipe.model).config)
    return Subject(recipe.name, config, recipe)


def parse_blocks(texts: Sequence[str], layout: BlockLayout) -> list[tuple[int, ...]]:
    """Block sizes like "16x16" for a layout.

    Raises:
        ConfigError: no such size, or one that does not divide the token grid.
    """
    sizes = []
    for text in texts:
        try:
            size = tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
        except ValueError:
            raise ConfigError("--blocks", found=repr(text), expected="tokens per axis, like 16x16") from None
        sizes.append(BlockLayout(layout.grid, size, layout.patch).block)
    return list(dict.fromkeys(sizes))


def block_family(layout: BlockLayout) -> list[tuple[int, ...]]:
    """Block sizes from the whole grid down: every axis divided alike; of videos whole frames first, then parts of one.

    The layout's own size is among them.
    """
    grid = layout.token_grid
    still = grid[1:] if layout.ndim == 3 else grid
    parts = [tuple(size // by for size in still) for by in _divisors(math.gcd(*still))]
    if layout.ndim == 3:
        frames = [(grid[0] // by, *still) for by in _divisors(grid[0])]
        parts = frames + [(1, *part) for part in parts[1:]]
    return sorted({*parts, layout.block}, key=lambda size: (-math.prod(size), size))


def _divisors(number: int) -> list[int]:
    return [by for by in range(1, number + 1) if number % by == 0]
