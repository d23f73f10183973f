"""What the commands share: how one is declared, its options' types, the exit codes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

AddCommand = Callable[..., argparse.ArgumentParser]
"""(name, run, summary, example) → the new command's parser. `run` takes the parsed options and returns an exit code or
None."""

EXIT_CODES = """exit codes:
  0  done                           4  NaN or infinite loss or gradient
  2  wrong recipe or option         5  storage: no room, damaged or missing checkpoint
  3  wrong or missing input data    6  another process of the run is gone
  130, 143  interrupted or terminated; a training run has saved first"""


def positive(text: str) -> int:
    """A positive integer, as argparse wants its types."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def finite(text: str) -> float:
    """A number that is one, as argparse wants its types."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def seed(text: str) -> int:
    """A seed that torch's generators take with room for the samples' own, as argparse wants its types."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 … 2^63 - 1")
    return value


def refuse_given(options: argparse.Namespace, names: Iterable[str], found: str, expected: str) -> None:
    """Raises ConfigError for the first of the options that was given (is neither empty, nor 0, nor false)."""
    from acdit.errors import ConfigError

    for name in names:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}", found=found, expected=expected)


def version() -> str:
    """The package's version."""
    from acdit import __version__

    return __version__


def adder(commands: Any, nested: bool = False) -> AddCommand:
    """How commands are declared below a parser.

    Args:
        commands: what the parser's `add_subparsers` gave.
        nested: below a command, which has read the common options already: only what is given again counts.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error", **_unset(nested))
    common.add_argument("--verbose", action="store_true", help="log what is chosen and done", **_unset(nested))

    def command(name: str, run: Callable[..., Any] | None, summary: str, example: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], help=summary, description=summary, epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    return command


def _unset(nested: bool) -> dict[str, Any]:
    return {"default": argparse.SUPPRESS} if nested else {}
