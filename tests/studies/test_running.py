"""Studies run, stop, go on and say the same; with judges that know nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from acdit.studies import measures
from acdit.studies.running import run_study
from acdit.studies.study import Arm, Study
from acdit.training import Trainer
from tests.studies.small import CONSTANT, DIGITS, branching_study, put_judges, small_study


class Killed(BaseException):
    """What nobody catches."""


def weigh(name: str, pipeline: Any, recipe: Any, setting: Any, seed: int, folder: Path) -> dict[str, Any]:
    """A measurement that depends on every bit of the weights."""
    total = sum(float(value.detach().double().abs().sum()) for value in pipeline.transformer.parameters())
    return {"frechet_distance": total, "conditional_accuracy": total % 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "measure", weigh)


def ran(study: Study, folder: Path, seeds: list[int], **options: Any) -> dict[str, Any]:
    put_judges(folder / "cache")
    lines: list[str] = []
    figures = run_study(
        study, DIGITS, folder / "out", seeds=seeds, cache=folder / "cache", say=lines.append, **options
    )  # fmt: skip
    return {**figures, "lines": lines}


def values(figures: dict[str, Any]) -> dict[str, list[float]]:
    return {arm["label"]: arm["metrics"]["frechet_distance"]["values"] for arm in figures["arms"]}


@pytest.mark.parametrize("study", [small_study(), branching_study()], ids=["plain", "branching"])
def test_killed_within_and_between_arms_it_goes_on_to_the_same_figures(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(study, tmp_path / "whole", [0, 1])
    taken_steps, kill_at = 0, {4, 8, 13}  # within the first run, at its end, within a later one
    step: Any = Trainer._step

    def stepping(self: Trainer, model: Any, batches: Any) -> Any:
        nonlocal taken_steps
        taken_steps += 1
        if taken_steps in kill_at:
            raise Killed
        return step(self, model, batches)

    readings = 0

    def measuring(*arguments: Any) -> dict[str, Any]:
        nonlocal readings
        readings += 1
        if readings == 2:
            raise Killed
        return weigh(*arguments)

    monkeypatch.setattr(Trainer, "_step", stepping)
    monkeypatch.setattr(measures, "measure", measuring)
    kills = 0
    while True:
        try:
            again = ran(study, tmp_path / "killed", [0, 1])
            break
        except Killed:
            kills += 1
    assert kills == 4
    assert values(again) == values(whole)  # to the bit
    assert [arm["label"] for arm in again["arms"]] == [arm.label for arm in study.arms]
    assert again["claims"] == whole["claims"]
    resumed = [run["seconds_training"] for arm in again["arms"] for run in arm["runs"]]
    assert None in resumed  # nobody knows how long a killed run took
    taken_steps = 100
    third = ran(study, tmp_path / "killed", [0, 1])
    assert taken_steps == 100  # nothing is run again
    assert third["claims"] == again["claims"]
    assert "are there already" in third["lines"][0]


def test_arms_that_studies_share_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    train: Any = Trainer.train

    def noting(self: Trainer) -> Any:
        trained.append(self.run.name)
        return train(self)

    monkeypatch.setattr(Trainer, "train", noting)
    one = ran(small_study(), tmp_path, [0])
    assert len(trained) == 2
    other = small_study("other", (Arm("same", ("model.block=[4, 4]",)), Arm("new", ("model.block=[2, 2]",), x=1)))
    two = ran(other, tmp_path, [0])
    assert len(trained) == 3
    assert values(one)["plain"] == values(two)["same"]
    ran(small_study(), tmp_path, [0, 1])  # another seed: two runs more
    assert len(trained) == len(set(trained)) == 5


def test_a_decay_that_starts_at_a_checkpoint_is_the_run_that_decays_there(tmp_path: Path) -> None:
    """Trunk at a constant rate, then the branch: to the bit the WSD run whose decay begins at that step."""
    study = small_study(
        "decay",
        (
            *branching_study().arms,
            Arm("in one go", ("optim.schedule=wsd", "optim.decay_fraction=0.5", "train.steps=4"), x=3),
        ),
    )  # fmt: skip
    found = values(ran(study, tmp_path, [2]))
    assert found["decayed"] == found["in one go"]
    assert len({*found["half way"], *found["end"], *found["decayed"]}) == 3


def test_what_a_study_leaves(tmp_path: Path) -> None:
    figures = ran(small_study(), tmp_path, [0, 1])
    written = json.loads((tmp_path / "out" / "small.json").read_text())
    assert written["claims"] == figures["claims"]
    for name in ("command", "commit", "versions", "machine", "rule", "seeds", "overrides"):
        assert name in written, name
    arm = written["arms"][1]
    assert arm["recipe_difference"]["model.block"] == [8, 8]
    assert arm["recipe_difference"]["train.steps"] == 5
    assert (arm["steps"], arm["samples_seen"], arm["num_blocks"]) == (5, 20, 1)
    assert arm["training_flops"] != written["arms"][0]["training_flops"]
    assert len(arm["metrics"]["frechet_distance"]["values"]) == 2
    low, high = arm["metrics"]["frechet_distance"]["interval"]
    assert low < arm["metrics"]["frechet_distance"]["mean"] < high
    assert arm["runs"][0]["seconds_training"] > 0
    assert str(tmp_path) not in json.dumps(written["arms"])  # no machine's paths
    table = (tmp_path / "out" / "small.md").read_text()
    assert f"**{written['claims'][0]['verdict']}**" in table
    assert "| one block |" in table
    assert len(Image.open(tmp_path / "out" / "small.png").convert("RGB").getcolors(1 << 20) or []) > 50


def test_the_callers_own_logging_is_as_it_was(tmp_path: Path) -> None:
    trainer = logging.getLogger("acdit.training")
    before = trainer.level
    ran(small_study(), tmp_path, [0])
    assert (trainer.level, diffusers_logging.is_progress_bar_enabled()) == (before, True)


def test_one_seed_is_not_resolved(tmp_path: Path) -> None:
    (claim,) = ran(small_study(), tmp_path, [0])["claims"]
    assert claim["verdict"] == "not resolved"
    assert claim["interval"] is None
    assert "the means point" in claim["shown"]
    assert "one seed" in (tmp_path / "out" / "small.md").read_text()


def test_models_that_have_learned_nothing_are_not_judged(tmp_path: Path) -> None:
    """All alike, they would let "costs nothing" pass."""
    plain = small_study()
    claim = dataclasses.replace(plain.claims[0], margin=1e6)
    lax = dataclasses.replace(plain, claims=(claim,))
    assert ran(lax, tmp_path, [0, 1])["claims"][0]["verdict"] == "reproduces"
    strict = dataclasses.replace(lax, floor=("conditional_accuracy", 1.5))
    (judged,) = ran(strict, tmp_path, [0, 1])["claims"]
    assert judged["verdict"] == "not resolved"
    assert "no arm has learned enough" in judged["shown"]


def test_raw_weights_and_averages_are_told_apart(tmp_path: Path) -> None:
    arms = tuple(
        Arm(weights, CONSTANT, "", place, weights=weights, at=1.0) for place, weights in enumerate(("ema", "raw"))
    )
    found = values(ran(small_study("weights", arms), tmp_path, [0]))
    assert found["ema"] != found["raw"]


def test_readings_of_other_sampling_are_taken_again(tmp_path: Path) -> None:
    ran(small_study(), tmp_path, [0])
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    ran(small_study(), tmp_path, [0], overrides=["sampling.num_inference_steps=2"])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == before
    folders = [path for path in (tmp_path / "cache").iterdir() if (path / "readings").is_dir()]
    assert [len(list((folder / "readings").iterdir())) for folder in folders] == [2, 2]


def test_a_job_travels_to_workers_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the true measurement: a worker knows nothing of ours
    torch.manual_seed(0)
    alone = ran(small_study(), tmp_path / "alone", [0])
    torch.manual_seed(0)
    together = ran(small_study(), tmp_path / "together", [0], workers=2)
    assert values(alone) == values(together)
