"""Recipe → data set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from acdit.data.digits import DigitsDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsDataset
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe

KINDS = ("digits", "images", "idx", "latents")


class Dataset(Protocol):
    """What the trainer reads: a map from index to (uint8 (C, H, W), class).

    Of cached latents the items are those of `LatentsDataset`.
    """

    num_classes: int
    class_names: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture, or (C, h, w) of every latent."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def build_dataset(recipe: DataRecipe, posterior: str = "mode") -> Dataset:
    """The data set a recipe names.

    Args:
        recipe: what to read.
        posterior: "mode" or "sample", of cached latents.

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
    if recipe.kind == "latents":
        return _build_latents(recipe, posterior)
    if recipe.kind == "idx":
        return IdxDataset(recipe.root, recipe.split, recipe.channels, recipe.size)
    return ImagesDataset(recipe.root, recipe.split, recipe.channels, recipe.size, recipe.max_bad_files)


def _build_latents(recipe: DataRecipe, posterior: str) -> LatentsDataset:
    assert recipe.root is not None
    dataset = LatentsDataset(recipe.root, recipe.flip, posterior)
    manifest = dataset.manifest
    for name, value, cached in (
        ("size", recipe.size, manifest.resolution),
        ("channels", recipe.channels, manifest.picture_channels),
        ("split", recipe.split, manifest.split),
    ):
        if value not in (None, cached):
            raise ConfigError(
                f"data.{name}", found=repr(value), expected=f"{cached!r}, of the pictures that were encoded",
                fix=f"set data.{name}={cached}, or encode anew",
            )  # fmt: skip
    return dataset
