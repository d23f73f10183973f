"""Which runs and readings a study needs: all recipes are made and checked here, before anything is trained.

Runs are named by what they are trained with, so arms of different studies that are equal are one run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from acdit.errors import ConfigError
from acdit.recipe import Recipe, difference, load_recipe, recipe_to_dict
from acdit.studies.study import Arm, Study

RUN_NAME = "study"
_NO_PART = {
    "train": ("threads", "checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "tensorboard",
              "timeout_seconds"),
    "data": ("num_workers", "max_bad_files"),
}  # fmt: skip
"""Fields of a recipe that what it trains does not depend on (threads: beyond rounding). Of sampling a reading does."""
_STUDY_OWN = ("name", "seed", "train.threads", "train.checkpoint_every", "train.keep_checkpoints", "train.epochs")


@dataclass(frozen=True)
class Run:
    """One training run."""

    recipe: Recipe
    parent: Run | None = None
    """The run whose checkpoint it starts from."""
    start: int = 0
    """That checkpoint's step."""
    keep: tuple[int, ...] = ()
    """Steps whose checkpoints are wanted later."""

    @property
    def key(self) -> str:
        """Name of its folder: a hash of all it depends on."""
        told = recipe_to_dict(self.recipe)
        for name in ("name", "sampling"):
            del told[name]
        for group, names in _NO_PART.items():
            for name in names:
                del told[group][name]
        parent = None if self.parent is None else self.parent.key
        whole = json.dumps([told, parent, self.start, self.keep], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reading:
    """One measurement of one run: a point of one arm, one seed."""

    arm: Arm
    seed: int
    run: Run
    step: int | None
    """Of the checkpoint that is measured; None: the finished model."""


def plan(
    study: Study, seeds: Sequence[int], overrides: Sequence[str] = (), *, data: str | None = None, threads: int = 1
) -> list[Reading]:
    """A reading for every arm and seed.

    Args:
        study: what to plan.
        seeds: of the runs.
        overrides: of all arms' recipes, such as "train.steps=100".
        data: of the base recipe's data.root.
        threads: of torch in a run.

    Raises:
        ConfigError: no seed, a seed twice, an override of what the study itself sets, a recipe that is wrong.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError("--seeds", found=" ".join(map(str, seeds)) or "none", expected="different ones, at least one")
    _refuse_own(study, overrides)
    root = [] if data is None else [f"data.root={json.dumps(data)}"]
    common = [*study.overrides, *root, *overrides, f"name={RUN_NAME}", f"train.threads={threads}"]
    steps = load_recipe(study.recipe, common).train.steps
    assert steps is not None  # every shipped recipe that studies start from has them, and epochs are refused
    wanted: dict[tuple[str, ...], set[int]] = {}
    for arm in study.arms:
        if arm.at is not None:
            wanted.setdefault(arm.overrides, set()).add(_step(arm.at, steps))
        if arm.branch is not None:
            wanted.setdefault(arm.branch.trunk, set()).add(_step(arm.branch.at, steps))

    def run_of(arm_overrides: tuple[str, ...], seed: int) -> Run:
        keep = tuple(sorted(wanted.get(arm_overrides, ())))
        kept = [f"train.checkpoint_every={math.gcd(steps, *keep)}", "train.keep_checkpoints=100000"] if keep else []
        return Run(load_recipe(study.recipe, [*common, *kept, *arm_overrides, f"seed={seed}"]), keep=keep)

    def branch_of(arm: Arm, seed: int) -> Run:
        assert arm.branch is not None
        start, end = _step(arm.branch.at, steps), _step(arm.branch.until, steps)
        if end <= start:
            raise ConfigError("train.steps", found=str(steps), expected="more: the decay has no step of its own")
        changed = ["optim.schedule=wsd", f"optim.decay_fraction={(end - start) / end}", f"train.steps={end}"]
        recipe = load_recipe(study.recipe, [*common, *arm.overrides, *changed, f"seed={seed}"])
        return Run(recipe, parent=run_of(arm.branch.trunk, seed), start=start)

    return [
        Reading(
            arm, seed, run_of(arm.overrides, seed) if arm.branch is None else branch_of(arm, seed),
            None if arm.at is None else _step(arm.at, steps),
        )
        for seed in seeds
        for arm in study.arms
    ]  # fmt: skip


def varied(study: Study) -> set[str]:
    """Dotted paths that arms change."""
    own = {override.partition("=")[0] for arm in study.arms for override in arm.overrides}
    branches = {"optim.schedule", "optim.decay_fraction"}
    return own | (branches if any(arm.branch is not None for arm in study.arms) else set())


def _refuse_own(study: Study, overrides: Sequence[str]) -> None:
    for override in overrides:
        path = override.partition("=")[0].strip().replace("-", "_")
        touched = [own for own in varied(study) if own == path or own.startswith(f"{path}.")]
        if touched or path in _STUDY_OWN:
            raise ConfigError(
                f"override {override!r}", found=f"{touched[0] if touched else path}, which the study itself sets",
                expected="fields that its arms share, such as train.steps",
                fix="--seeds, --threads" if path in ("seed", "train.threads") else "",
            )  # fmt: skip


def _step(share: float, steps: int) -> int:
    step = round(share * steps)
    if step < 1:
        raise ConfigError("train.steps", found=str(steps), expected=f"more: {share:.0%} of them is no step")
    return step


def apart(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """What a run's recipe changes in its base, by dotted path, as a result file tells it: no names, seeds, threads."""
    left_out = (
        "name",
        "seed",
        "data.root",
        *(f"{group}.{name}" for group, names in _NO_PART.items() for name in names),
    )
    return {path: now for path, (_, now) in difference(base, recipe).items() if path not in left_out}
