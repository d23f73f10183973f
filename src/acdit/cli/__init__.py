"""The command line: one module a command; heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import errno
import logging
import re
import sys
from collections.abc import Sequence

from acdit.allocator import keep_freed_memory
from acdit.cli import (
    analyze,
    app,
    classify,
    consolidate,
    convert,
    data,
    demo,
    encode,
    evaluate,
    export,
    finetune,
    plan,
    recipes,
    sample,
    study,
    train,
)
from acdit.cli.parser import EXIT_CODES, adder, version

# What the system says when a place cannot be written or read: the user's disk, not our bug.
_STORAGE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.ENOENT,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit code; see `EXIT_CODES`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parsed([_dashes(argument) for argument in given])
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    if options.debug:
        return int(options.run(options) or 0)
    return _guarded(options)


def _guarded(options: argparse.Namespace) -> int:
    """Run the command; a user's mistake or a fault outside becomes one line and an exit code."""
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        return _fail(_out_of_memory(str(error)), 1)
    except Exception as error:
        from acdit.errors import AcditError

        if isinstance(error, AcditError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            from acdit import storage

            told = storage.explained(error)
            return _fail(str(told), told.exit_code)
        text = str(error)
        if type(error).__name__ == "OutOfMemoryError" or re.search(r"can't allocate memory|out of memory", text, re.I):
            return _fail(_out_of_memory(text), 1)
        return _fail(f"{type(error).__name__}: {text} (this looks like a bug; --debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"acdit: error: {message}", file=sys.stderr)
    return code


def _out_of_memory(detail: str) -> str:
    first = detail.strip().splitlines()[0] if detail.strip() else "no detail"
    return (
        f"out of memory ({first[:120]}). Fix: a smaller optim.batch_size, a larger optim.accumulation (same result, "
        "less memory), or train.gradient_checkpointing=elementwise (or layers: least memory, a forward more)"
    )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; recipe overrides (key.key=value) may stand anywhere, where argparse wants positionals together."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        overrides = options.overrides = list(options.overrides)
        if "=" in (getattr(options, "resume", None) or ""):  # `--resume train.steps=9`: latest, and an override
            overrides.append(options.resume)
            options.resume = "latest"
        overrides += [argument for argument in left if "=" in argument and not argument.startswith("-")]
        left = [argument for argument in left if argument not in overrides]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return options


def _dashes(argument: str) -> str:
    """`--guidance_scale` and `--guidance-scale` are one flag."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acdit",
        description="Blockwise autoregressive diffusion transformers (ACDiT).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"acdit {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    making, using = (train, finetune, data, encode, plan), (sample, evaluate, classify, analyze, study, app)
    for module in (*making, *using, consolidate, convert, export, demo, recipes):
        module.add(adder(commands))
    return parser
