"""acdit data"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from acdit.cli.parser import AddCommand, positive

if TYPE_CHECKING:
    from acdit.recipe import Recipe


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "data", _data, "Show what a recipe's data hold, before training.", "acdit data mnist data.root=/data/mnist"
    )
    made.add_argument("recipe", help="a shipped recipe's name (see `acdit recipes`) or a YAML path")
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    made.add_argument("--samples", type=positive, default=1000, help="how many to read, evenly spaced (default: 1000)")
    made.add_argument("--all", action="store_true", help="read every sample: finds every bad file")


def _data(options: argparse.Namespace) -> None:
    from acdit.errors import DataError
    from acdit.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from acdit.data.build import TEXT_KINDS, build_dataset
    from acdit.data.summary import summarize

    if recipe.data.kind in TEXT_KINDS:
        _text(recipe, None if options.all else options.samples)
        return
    found = summarize(build_dataset(recipe.data), None if options.all else options.samples)
    clips = len(found.shape) == 4
    axes = ("channels", *(["frames"] if clips else []), "height", "width")
    names = ", ".join(found.class_names[:8]) + (", …" if len(found.class_names) > 8 else "")
    lines = [
        ("samples", "unknown: a stream" if found.samples is None else f"{found.samples:,}"),
        ("classes", f"{len(found.class_names)}: {names}"),
    ]
    if found.class_sizes is not None:
        lines.append(("samples a class", "{:,} … {:,}".format(*found.class_sizes)))
    lines.append(("sample", f"{' × '.join(map(str, found.shape))} ({' × '.join(axes)})"))
    if found.stored is not None:
        smallest, largest = ("{} × {}".format(*size) for size in found.stored)
        lines.append(("stored as", smallest if smallest == largest else f"{smallest} … {largest}"))
    for name, values in (("mean", found.mean), ("std", found.std)):
        lines.append((name, ", ".join(f"{value:.4f}" for value in values)))
    lines.append(("looked at", f"{found.looked_at:,} samples"))
    lines.append(("bad files", str(len(found.bad_files))))
    print("\n".join(f"{name:<16} {value}" for name, value in lines))
    classes = recipe.model.num_classes
    if classes is not None and classes != len(found.class_names):
        raise DataError(
            "model.num_classes", found=f"{classes}, and {len(found.class_names)} classes in the data",
            expected="the same number", fix=f"set model.num_classes={len(found.class_names)}, or check data.root",
        )  # fmt: skip
    _require_few(found.bad_files, recipe.data.max_bad_files, "clip" if clips else "picture")


def _text(recipe: Recipe, at_most: int | None) -> None:
    from acdit.data.build import build_dataset
    from acdit.data.text import TextDataset
    from acdit.data.text_stream import TextStream
    from acdit.data.text_summary import describe_text

    # However many bad ones there are, they are listed first.
    lenient = recipe.data if recipe.data.kind == "builtin_text" else replace(recipe.data, max_bad_files=2**31 - 1)
    dataset = build_dataset(lenient)
    assert isinstance(dataset, TextDataset | TextStream)
    print("\n".join(f"{name:<16} {value}" for name, value in describe_text(dataset, at_most)))
    _require_few(dataset.bad_files.reasons, recipe.data.max_bad_files, "text")


def _require_few(bad_files: Mapping[str, str], limit: int, what: str) -> None:
    from acdit.errors import DataError

    if len(bad_files) > limit:
        name, reason = next(iter(bad_files.items()))
        raise DataError(
            name, found=f"a bad {what} ({reason}), the first of {len(bad_files)}",
            expected=f"at most {limit} (data.max_bad_files)",
            fix="repair or remove the file, or raise data.max_bad_files to skip some",
        )  # fmt: skip
