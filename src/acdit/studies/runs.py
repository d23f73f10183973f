"""Runs and readings, made where they are missing: a run goes on exactly where it was stopped, a finished one is not run
again, a reading is taken once.

    CACHE/<hash>/           a run of the trainer, named by what it is trained with; trained.json when it is finished
    CACHE/<hash>/readings/  what was measured of it
    CACHE/judges/           classifiers that judge
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from acdit import provenance, storage
from acdit.allocator import keep_freed_memory
from acdit.errors import StorageError
from acdit.pipelines import ACDiTPipeline
from acdit.studies import measures
from acdit.studies.catalog import Setting
from acdit.studies.plan import Reading, Run
from acdit.studies.study import Study
from acdit.training import Trainer
from acdit.training.consolidate import consolidate
from acdit.training.history import committed_checkpoints
from acdit.workers import Progress, run_tasks

logger = logging.getLogger(__name__)

_TRAINED = "trained.json"


@dataclass
class Job:
    """A run and what is to be measured of it. It travels to a worker."""

    run: Run
    readings: list[Reading]
    measure: str
    setting: Setting
    cache: Path

    def missing(self) -> list[Reading]:
        """Readings that are not there yet."""
        return [reading for reading in self.readings if not self.file(reading).is_file()]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.cache / self.run.key / _TRAINED).is_file() and not self.missing()

    def file(self, reading: Reading) -> Path:
        """Where a reading is kept: named by all it depends on."""
        settings = {
            "protocol": measures.protocol(self.measure, self.setting), "step": reading.step,
            "weights": reading.arm.weights, "sampling": vars(reading.run.recipe.sampling),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.cache / reading.run.key / "readings" / f"{self.measure}-{digest}.json"

    def do(self, progress: Progress) -> None:
        """Train what is not trained, measure what is not measured; `progress` is asked in between whether to stop."""
        progress(0)
        train(self.run, self.cache)
        for reading in self.missing():
            progress(0)
            take(reading, self)
        progress(1)


@dataclass
class _Work:
    jobs: list[Job]

    def prepare(self, worker: int) -> None:
        keep_freed_memory()

    def __call__(self, item: int, progress: Progress) -> int:
        with _quiet():
            self.jobs[item].do(progress)
        return item


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar of loading a model, once a run, and warnings that pictures and tensorboard are off: it is meant.

    Everything is as before afterwards: one worker is the caller's own process.
    """
    trainer = logging.getLogger("acdit.training")
    level, bars = trainer.level, diffusers_logging.is_progress_bar_enabled()
    trainer.setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        trainer.setLevel(level)
        if bars:
            diffusers_logging.enable_progress_bar()


def train(run: Run, cache: Path) -> Path:
    """The folder of a finished run: found there, gone on with, or begun.

    Raises:
        StorageError: another process is at it, or the run it starts from lacks its checkpoint.
    """
    folder = cache / run.key
    if (folder / _TRAINED).is_file():
        return folder
    resumed = bool(committed_checkpoints(folder))
    branch_from = None
    if run.parent is not None and not resumed:
        branch_from = cache / run.parent.key / f"checkpoint-{run.start}"
    started = time.perf_counter()
    Trainer(run.recipe, folder, resume="latest" if resumed else None, branch_from=branch_from, progress=False).train()
    told = {
        "seconds": None if resumed else round(time.perf_counter() - started, 1),
        "resumed": resumed, "threads": torch.get_num_threads(), **provenance.facts(),
    }  # fmt: skip
    storage.write_json_atomic(folder / _TRAINED, told)
    return folder


def take(reading: Reading, job: Job) -> dict[str, Any]:
    """Measure, and keep what came out."""
    folder = job.cache / reading.run.key
    model, weights = folder / "model", reading.arm.weights
    if reading.step is not None or weights != "ema":
        last = reading.run.recipe.train.steps
        step = last if reading.step is None else reading.step
        model = folder / "models" / f"{step}-{weights}"
        if not storage.is_committed(model):
            consolidate(folder / f"checkpoint-{step}", model, weights=weights)
    started = time.perf_counter()
    pipeline = ACDiTPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    figures = measures.measure(
        job.measure, pipeline, reading.run.recipe, job.setting, reading.seed, job.cache / "judges"
    )
    kept = {
        "figures": figures, "seconds": round(time.perf_counter() - started, 1), "commit": provenance.commit(),
        "weights_sha256": provenance.weights_sha256(pipeline.transformer),
    }  # fmt: skip
    storage.write_json_atomic(job.file(reading), kept)
    return kept


def jobs_of(study: Study, setting: Setting, readings: Sequence[Reading], cache: Path) -> list[Job]:
    """One job a run; runs that others start from come first, measured or not."""
    found: dict[str, Job] = {}
    for reading in readings:
        for run in (reading.run.parent, reading.run):
            if run is not None:
                found.setdefault(run.key, Job(run, [], study.measure, setting, cache))
        found[reading.run.key].readings.append(reading)
    return sorted(found.values(), key=lambda job: job.run.parent is not None)


def do_all(jobs: Sequence[Job], *, workers: int, threads: int, say: Callable[[str], None]) -> None:
    """Do what is not done, runs that others start from first.

    Args:
        jobs: of `jobs_of`.
        workers: processes; with one all is done in this one.
        threads: of torch in each.
        say: called with a line for every job.

    Raises:
        StorageError, ConfigError, DataError: as the trainer and the measures raise them.
    """
    open_jobs = [job for job in jobs if not job.done]
    if len(open_jobs) < len(jobs):
        say(f"{len(jobs) - len(open_jobs)} of {len(jobs)} runs are there already")
    begun, count = time.perf_counter(), 0
    for wave in (False, True):
        wanted = [job for job in open_jobs if (job.run.parent is not None) == wave]
        work = _Work(wanted)
        for item in run_tasks(work, range(len(wanted)), workers=workers, threads=threads, on_progress=_nothing):
            count += 1
            took = time.perf_counter() - begun
            say(f"{count} of {len(open_jobs)} runs, {took / 60:.1f} min: {_told(wanted[item])}")


def kept(job: Job, reading: Reading) -> dict[str, Any]:
    """A reading that was taken.

    Raises:
        StorageError: it cannot be read.
    """
    file = job.file(reading)
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StorageError(f"{file}", found=type(error).__name__, expected="a reading", fix="remove it") from None


def trained(job: Job) -> dict[str, Any]:
    """What a finished run tells of its training."""
    return dict(json.loads((job.cache / job.run.key / _TRAINED).read_text(encoding="utf-8")))


def _told(job: Job) -> str:
    if not job.readings:
        return f"seed {job.run.recipe.seed}, for others to start from"
    told = []
    for reading in job.readings:
        figures = kept(job, reading)["figures"]
        numbers = [f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)][:2]
        told.append(f"{reading.arm.label}, seed {reading.seed}: {', '.join(numbers)}")
    return "; ".join(told)


def _nothing(_: int) -> None:
    pass
