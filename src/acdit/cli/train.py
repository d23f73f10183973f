"""acdit train"""

from __future__ import annotations

import argparse
from pathlib import Path

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command("train", _train, "Train from a recipe.", "acdit train digits optim.lr=1e-3 --output runs/digits")
    made.add_argument("recipe", help="a shipped recipe's name (see `acdit recipes`) or a YAML path")
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields")
    made.add_argument("--output", help="the run's directory (default: runs/<recipe's name>)")
    made.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT",
        help="go on exactly where the run stopped; checkpoint-N picks one, default the latest that is whole",
    )  # fmt: skip
    made.add_argument(
        "--from", dest="branch_from", metavar="RUN/checkpoint-N",
        help="start from another run's checkpoint with this recipe's schedule (the WSD decay, for instance)",
    )  # fmt: skip
    made.add_argument("--allow-inexact", action="store_true", help="resume even without generator states")


def _train(options: argparse.Namespace) -> None:
    from acdit.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before torch: a typo answers at once
    from acdit.training import Trainer

    output = Path(options.output or f"runs/{recipe.name}")
    Trainer(
        recipe,
        output,
        resume=options.resume,
        branch_from=options.branch_from,
        allow_inexact=options.allow_inexact,
    ).train()
    print(f"done: {output / 'model'} (look at {output / 'loss.png'}; sample with: acdit sample {output / 'model'})")
