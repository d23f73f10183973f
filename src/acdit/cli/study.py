"""acdit study"""

from __future__ import annotations

import argparse
import os
from typing import Any

from acdit.cli.parser import AddCommand, positive, seed

_ALL = "all"


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "study", _study,
        "The paper's figures in small: a sweep that trains, measures and judges, and goes on where it was stopped.",
        "acdit study                                       # lists them\n"
        "  acdit study ar-length --workers 2\n"
        "  acdit study all --workers 2\n"
        "  acdit study ar-length --on mnist --data /data/mnist train.steps=300",
    )  # fmt: skip
    made.add_argument("name", nargs="?", help="which; all: one after the other; none: list them")
    made.add_argument("overrides", nargs="*", metavar="key.key=value", help="change recipe fields of all arms")
    made.add_argument("--on", default="digits", metavar="DATA", help="digits (default), mnist or cifar10")
    made.add_argument("--data", metavar="PATH", help="where mnist or cifar10 lies")
    made.add_argument("--output", metavar="FOLDER", help="default runs/study-NAME, of other data runs/study-NAME-DATA")
    made.add_argument("--seeds", type=seed, nargs="+", default=[], help="default 0 1 2; of mnist and cifar10 0")
    made.add_argument("--cache", metavar="FOLDER", help="of the runs, which studies share (default runs/study-runs)")
    made.add_argument("--workers", type=positive, default=1, help="runs side by side (default 1)")
    made.add_argument("--threads", type=positive, help="of each (default: the cores, shared by the workers)")


def _study(options: argparse.Namespace) -> None:
    from acdit.studies.catalog import find_setting, find_study, studies

    setting = find_setting(options.on)
    known = studies(setting)
    if options.name is not None and "=" in options.name:  # an override where the name should be
        options.overrides, options.name = [options.name, *options.overrides], None
    if options.name is None:
        _list(options, known)
        return
    chosen = list(known.values()) if options.name == _ALL else [find_study(options.name, setting)]
    if options.name == _ALL and options.output is not None:
        from acdit.errors import ConfigError

        raise ConfigError("--output", found=options.output, expected="nothing with all: each has a folder of its own")
    from acdit.evaluation.sweep import require_matplotlib
    from acdit.studies.running import run_study

    require_matplotlib("acdit study")
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.workers)
    suffix = "" if setting.name == "digits" else f"-{setting.name}"
    for study in chosen:
        output = options.output or f"runs/study-{study.name}{suffix}"
        print(f"{study.name}: {study.question} ({study.figure})", flush=True)
        figures = run_study(
            study, setting, output, seeds=options.seeds, overrides=options.overrides, data=options.data,
            cache=options.cache or "runs/study-runs", workers=options.workers, threads=threads, say=_say,
        )  # fmt: skip
        for one in figures["claims"]:
            print(f"{one['verdict']}: {one['claim']}: {one['shown']}")
        print(f"see {output}/{study.name}.md, .json, .png", flush=True)


def _list(options: argparse.Namespace, known: dict[str, Any]) -> None:
    from acdit.cli.parser import refuse_given

    refuse_given(options, ("output", "seeds", "cache", "data"), "given without a study", "the name of one")
    if options.overrides:
        from acdit.errors import ConfigError

        raise ConfigError(options.overrides[0], found="given without a study", expected="the name of one before it")
    for name, study in known.items():
        print(f"{name:16} {study.figure}: {study.question}")


def _say(line: str) -> None:
    print(line, flush=True)
