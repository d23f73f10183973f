"""Recipe → data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from acdit.codecs.text import Tokenizer
from acdit.data.classes import read_class_list
from acdit.data.clips import ClipsDataset
from acdit.data.digits import DigitsDataset
from acdit.data.frame_choice import FrameChoice
from acdit.data.hf import HFDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsDataset
from acdit.data.moving import moving_digits, moving_idx
from acdit.data.shards import ShardsDataset
from acdit.data.stream import PictureStream, StreamDataset
from acdit.data.text_build import build_text
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe

TEXT_KINDS = ("text", "hf_text", "builtin_text")
PICTURE_KINDS = ("digits", "images", "idx", "webdataset", "hf", "latents", "clips", "moving_digits", "moving_idx")
KINDS = PICTURE_KINDS + TEXT_KINDS
# Settings that only some kinds have a use for: elsewhere they must keep their default.
_ONLY_FOR = {
    "max_bad_files": ("images", "webdataset", "hf", "clips", "text", "hf_text"),
    "root": tuple(kind for kind in KINDS if kind != "builtin_text"),
    "size": PICTURE_KINDS,
    "channels": PICTURE_KINDS,
    "flip": PICTURE_KINDS,
    "shift": tuple(kind for kind in PICTURE_KINDS if kind != "latents"),
    "crop": ("images", "idx", "webdataset", "hf", "clips", *TEXT_KINDS),
    "classes": ("images", "idx", "webdataset", "hf", "clips", "moving_idx"),
    "image_column": ("hf",),
    "label_column": ("webdataset", "hf"),
    "streaming": ("hf", "hf_text"),
    "shuffle_buffer": ("hf", "hf_text"),
    "frames": ("clips", "moving_digits", "moving_idx"),
    "frame_stride": ("clips",),
    "fps": ("clips",),
    "start": ("clips",),
    "short_clips": ("clips",),
    "split_file": ("clips",),
    "digits_per_clip": ("moving_idx",),
    "tokenizer": TEXT_KINDS,
    "sequence_length": TEXT_KINDS,
    "wrap": TEXT_KINDS,
    "document": ("text",),
    "text_column": ("text", "hf_text"),
    "held_out": ("text", "hf_text"),
    "subset": ("hf", "hf_text"),
    "cache": ("text", "hf_text"),
}


class Dataset(Protocol):
    """What the trainer reads: a map from index to (uint8 (C, H, W), or (C, T, H, W) of clips, class).

    Of cached latents the items are those of `LatentsDataset`, of text those of `TextDataset`: (int64 (S,), 0). A
    `StreamDataset` has no length and no index; `length` tells them apart.
    """

    num_classes: int
    class_names: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every picture, (C, T, H, W) of every clip, (C, h, w) of every latent, or (S,) of text."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class CroppedDataset(Dataset, Protocol):
    """A data set that crops where it is told to: what data.crop=random needs."""

    def cropped(self, index: int, place: Sequence[float] | None) -> tuple[Tensor, int]:
        """As `[index]`, cropped where the draws say."""
        ...


def length(dataset: Dataset | StreamDataset) -> int | None:
    """Samples in a data set; None: a stream, of which nobody knows."""
    return None if isinstance(dataset, StreamDataset) else len(dataset)


def require_used(recipe: DataRecipe) -> None:
    """Refuse a setting that the recipe's kind of data has no use for.

    Raises:
        ConfigError: an unknown kind, or such a setting.
    """
    if recipe.kind not in KINDS:
        raise ConfigError("data.kind", found=repr(recipe.kind), expected=f"one of {KINDS}")
    for setting in dataclasses.fields(recipe):
        value, kinds = getattr(recipe, setting.name), _ONLY_FOR.get(setting.name, KINDS)
        if recipe.kind not in kinds and value != setting.default:
            raise ConfigError(
                f"data.{setting.name}", found=repr(value),
                expected=f"{setting.default!r}: only data.kind={' or '.join(kinds)} has a use for it",
            )  # fmt: skip


def as_measured(recipe: DataRecipe, split: str | None = None) -> DataRecipe:
    """The data with all chosen once that training chooses at random: nothing mirrored or shifted, crops in the middle.

    Args:
        recipe: as trained on.
        split: another one.
    """
    start = "center" if recipe.kind == "clips" and recipe.start == "random" else recipe.start
    return dataclasses.replace(
        recipe, flip=False, shift=0, crop="center", start=start, split=recipe.split if split is None else split
    )


def build_dataset(
    recipe: DataRecipe, posterior: str = "mode", clips_per_file: int = 1, tokenizer: Tokenizer | None = None
) -> Dataset | StreamDataset:
    """The data set a recipe names.

    Args:
        recipe: what to read.
        posterior: "mode" or "sample", of cached latents.
        clips_per_file: see `ClipsDataset`.
        tokenizer: of text, a model's own instead of the one that data.tokenizer names.

    Raises:
        ConfigError: an unknown kind, a missing root, or a setting that this kind has no use for.
        DataError: what the data set itself refuses.
    """
    require_used(recipe)
    usual = DataRecipe(kind="hf").shuffle_buffer
    if recipe.kind in ("hf", "hf_text") and not recipe.streaming and recipe.shuffle_buffer != usual:
        raise ConfigError(
            "data.shuffle_buffer", found=f"{recipe.shuffle_buffer}, without data.streaming=true",
            expected=f"{usual}: data that are no stream are shuffled whole",
        )  # fmt: skip
    if recipe.crop == "random" and recipe.size is None and recipe.kind not in TEXT_KINDS:
        raise ConfigError("data.crop", found="random, without data.size", expected="a size to crop to")
    if recipe.kind in ("digits", "moving_digits"):
        return _build_digits(recipe)
    if recipe.kind == "builtin_text":
        return build_text(recipe, tokenizer)
    if recipe.root is None:
        what = recipe.kind.removeprefix("moving_")
        raise ConfigError(
            "data.root", found="nothing", expected="where the text lies" if "text" in what else f"where the {what} lie",
            fix="add data.root=/path/to/data",
        )  # fmt: skip
    if recipe.kind in TEXT_KINDS:
        return build_text(recipe, tokenizer)
    if recipe.kind == "latents":
        return _build_latents(recipe, posterior)
    classes = None if recipe.classes is None else read_class_list(recipe.classes)
    if recipe.kind == "idx":
        return IdxDataset(recipe.root, recipe.split, recipe.channels, recipe.size, classes)
    if recipe.kind == "moving_idx":
        canvas = 64 if recipe.size is None else recipe.size
        moving = (recipe.frames, canvas, recipe.digits_per_clip, recipe.channels, classes)
        return moving_idx(recipe.root, recipe.split, *moving)
    files = (recipe.root, recipe.split, recipe.channels, recipe.size, recipe.max_bad_files)
    if recipe.kind == "hf":
        columns = (recipe.image_column, recipe.label_column, classes)
        if recipe.streaming:
            return PictureStream(*files, *columns, recipe.shuffle_buffer, recipe.num_workers, recipe.subset)
        return HFDataset(*files, *columns, recipe.subset)
    if recipe.kind == "webdataset":
        return ShardsDataset(*files, recipe.label_column, classes)
    if recipe.kind == "clips":
        choice = FrameChoice(recipe.frames, recipe.frame_stride, recipe.fps, recipe.start, recipe.short_clips)
        return ClipsDataset(*files, classes, choice, recipe.split_file, clips_per_file)
    return ImagesDataset(*files, classes)


def _build_digits(recipe: DataRecipe) -> Dataset:
    """The built-in digits, still or moving."""
    moving = recipe.kind == "moving_digits"
    found = {"root": recipe.root, "channels": recipe.channels, **({} if moving else {"size": recipe.size})}
    for name, allowed in (("root", (None,)), ("size", (None, 8)), ("channels", (1,))):
        if name in found and found[name] not in allowed:
            raise ConfigError(
                f"data.{name}", found=repr(found[name]), expected=f"{allowed[-1]}: the built-in digits are 8×8 and gray"
            )
    if moving:
        return moving_digits(recipe.split, recipe.frames, 16 if recipe.size is None else recipe.size)
    return DigitsDataset(recipe.split)


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
