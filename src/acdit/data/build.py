"""Recipe → data set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from acdit.data.digits import DigitsDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe

KINDS = ("digits", "images", "idx")


class Dataset(Protocol):
    """What the trainer reads: a map from index to (uint8 (C, H, W), class)."""

    num_classes: int
    class_names: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def build_dataset(recipe: DataRecipe) -> Dataset:
    """The data set a recipe names.

    Raises:
        ConfigError: an unknown kind, a missing root, or a setting that this kind has no use for.
        DataError: what the data set itself refuses.
    """
    if recipe.kind not in KINDS:
        raise ConfigError("data.kind", found=repr(recipe.kind), expected=f"one of {KINDS}")
    if recipe.kind != "images" and recipe.max_bad_files:
        raise ConfigError(
            "data.max_bad_files", found=str(recipe.max_bad_files), expected="0: only data.kind=images has many files"
        )
    if recipe.kind == "digits":
        for name, value, allowed in (
            ("root", recipe.root, (None,)),
            ("size", recipe.size, (None, 8)),
            ("channels", recipe.channels, (1,)),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"data.{name}", found=repr(value), expected=f"{allowed[-1]}: the built-in digits are 8×8 and gray"
                )
        return DigitsDataset(recipe.split)
    if recipe.root is None:
        raise ConfigError(
            "data.root", found="nothing", expected=f"where the {recipe.kind} lie", fix="add data.root=/path/to/data"
        )
    if recipe.kind == "idx":
        return IdxDataset(recipe.root, recipe.split, recipe.channels, recipe.size)
    return ImagesDataset(recipe.root, recipe.split, recipe.channels, recipe.size, recipe.max_bad_files)
