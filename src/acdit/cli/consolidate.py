"""acdit consolidate"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "consolidate", _consolidate, "Make one model folder out of a checkpoint, whole or in shards.",
        "acdit consolidate runs/digits/checkpoint-1000 models/digits --weights ema",
    )  # fmt: skip
    made.add_argument("checkpoint", help="RUN/checkpoint-N, of any number of processes, under ddp or fsdp2")
    made.add_argument("output", help="the folder to make")
    made.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="the averaged weights (default), or the raw ones"
    )
    made.add_argument("--decay", type=float, help="which average, by its decay (default: the recipe's first)")


def _consolidate(options: argparse.Namespace) -> None:
    from acdit.training.consolidate import consolidate

    consolidate(options.checkpoint, options.output, weights=options.weights, decay=options.decay)
    print(f"done: {options.output}")
