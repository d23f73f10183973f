"""A study from beginning to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acdit.errors import ConfigError
from acdit.studies import measures, report
from acdit.studies.catalog import Setting
from acdit.studies.plan import plan
from acdit.studies.runs import do_all, jobs_of
from acdit.studies.study import Study


def run_study(
    study: Study,
    setting: Setting,
    output: str | Path,
    *,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    data: str | None = None,
    cache: str | Path | None = None,
    workers: int = 1,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure what is missing, then judge. The same call goes on after a kill, with the same figures.

    Args:
        study: of `acdit.studies.catalog`.
        setting: its data.
        output: folder of NAME.json, NAME.md and NAME.png.
        seeds: of the runs; none: the setting's.
        overrides: of all arms' recipes, such as "train.steps=100".
        data: where the data are, of settings that are not built in.
        cache: folder of runs, which studies share; None: study-runs beside `output`.
        workers: runs side by side, each in a process of its own.
        threads: of torch in each.
        say: called with a line for every run that is finished.

    Returns:
        What NAME.json holds.

    Raises:
        ConfigError: before anything is trained.
        StorageError, DataError, NonFiniteError: of the trainer, the data and the measures.
    """
    output = Path(output)
    if setting.needs_data == (data is None):
        found, expected = ("nothing", f"where {setting.name} lies") if data is None else (
            data, f"nothing: {setting.what} are built in",
        )  # fmt: skip
        raise ConfigError("--data", found=found, expected=expected)
    readings = plan(study, seeds or setting.seeds, overrides, data=data, threads=threads)
    place = output.parent / "study-runs" if cache is None else Path(cache)
    jobs = jobs_of(study, setting, readings, place)
    if any(not job.done for job in jobs):
        measures.prepare(study.measure, setting, readings[0].run.recipe, place / "judges")
    do_all(jobs, workers=workers, threads=threads, say=say)
    figures = report.figures_of(study, readings, jobs, overrides, setting.name)
    report.write(figures, study, output)
    return figures
