"""acdit recipes"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    command("recipes", _recipes, "List the shipped recipes.", "acdit recipes")


def _recipes(options: argparse.Namespace) -> None:
    from acdit.recipe import shipped_recipes

    print("\n".join(shipped_recipes()))
