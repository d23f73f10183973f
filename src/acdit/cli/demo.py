"""acdit demo"""

from __future__ import annotations

import argparse

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "demo", _demo, "Train on the built-in digits and look at the result.",
        "acdit demo --output runs/demo\n  acdit demo --video --output runs/demo-video\n  acdit demo --text",
    )  # fmt: skip
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change fields of the recipe")
    kind = made.add_mutually_exclusive_group()
    kind.add_argument("--video", action="store_true", help="digits that move, and a stream of them")
    kind.add_argument("--text", action="store_true", help="a text by blocks of characters, and by one at a time")
    made.add_argument("--output", help="default runs/demo, runs/demo-video or runs/demo-text")
    made.add_argument("--seed", type=int, default=0)


def _demo(options: argparse.Namespace) -> None:
    if options.video:
        from acdit.demo_video import run_demo_video

        run_demo_video(options.output or "runs/demo-video", seed=options.seed, overrides=options.overrides)
        return
    if options.text:
        from acdit.demo_text import run_demo_text

        run_demo_text(options.output or "runs/demo-text", seed=options.seed, overrides=options.overrides)
        return
    from acdit.demo import run_demo

    run_demo(options.output or "runs/demo", seed=options.seed, overrides=options.overrides)
