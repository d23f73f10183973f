"""acdit convert"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "convert", _convert, "Convert a released checkpoint of the reference (thunlp/ACDiT) to a model folder.",
        "acdit convert ACDiT-XL-img.pt models/acdit-xl-img",
    )  # fmt: skip
    made.add_argument("checkpoint", help="the .pt file; no code in it is executed")
    made.add_argument("output", help="the folder to make")


def _convert(options: argparse.Namespace) -> None:
    from acdit.convert import convert_reference

    convert_reference(options.checkpoint, options.output)
    print(f"done: {options.output}")
