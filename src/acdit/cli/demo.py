"""acdit demo"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "demo", _demo, "Train on the built-in digits and look at the result.", "acdit demo --output runs/demo"
    )
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change fields of the recipe `digits`")
    made.add_argument("--output", default="runs/demo", help="default runs/demo")
    made.add_argument("--seed", type=int, default=0)


def _demo(options: argparse.Namespace) -> None:
    from acdit.demo import run_demo

    run_demo(options.output, seed=options.seed, overrides=options.overrides)
