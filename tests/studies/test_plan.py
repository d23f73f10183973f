"""Which runs a study needs, and what it refuses."""

from __future__ import annotations

import pytest

from acdit.errors import ConfigError
from acdit.studies.catalog import SETTINGS, find_setting, find_study, studies
from acdit.studies.plan import Reading, plan
from acdit.studies.study import Arm, Branch
from tests.studies.small import CONSTANT, DIGITS, branching_study, small_study


def keys(readings: list[Reading]) -> set[str]:
    own = {reading.run.key for reading in readings}
    return own | {reading.run.parent.key for reading in readings if reading.run.parent is not None}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_study_is_whole(name: str) -> None:
    """Labels are unique, contrasts name arms and sum to nothing, and every recipe is one."""
    setting = SETTINGS[name]
    for study in studies(setting).values():
        labels = [arm.label for arm in study.arms]
        assert len(set(labels)) == len(labels)
        assert len({(arm.line, arm.x) for arm in study.arms}) == len(labels)
        assert study.claims
        for claim in study.claims:
            assert {label for label, _ in claim.contrast} <= set(labels)
            assert sum(weight for _, weight in claim.contrast) == pytest.approx(0)
            assert study.metric(claim.metric) in study.metrics
        readings = plan(study, [0], data="/data" if setting.needs_data else None)
        assert [reading.arm for reading in readings] == list(study.arms)
        assert len(keys(readings)) <= len(labels)
        steps = {reading.run.recipe.train.steps for reading in readings if reading.arm.branch is None}
        assert len(steps) == 1  # equal steps, and with one batch size equal samples
        assert len({reading.run.recipe.optim.batch_size for reading in readings}) == 1


def test_studies_share_their_equal_arms() -> None:
    """The plain recipe is one run, in whichever study it stands."""
    known = studies(DIGITS)
    plain = {}
    for name, label in (
        ("ar-length", "patch 1, 4 blocks"), ("model-size", "4×64, 4 blocks"), ("positions", "RoPE-ND"),
        ("context", "clean"), ("decay", "average, decayed, 100%"), ("representation", "ACDiT"),
    ):  # fmt: skip
        plain[name] = next(one.run.key for one in plan(known[name], [0]) if one.arm.label == label)
    assert len(set(plain.values())) == 1
    everything = set().union(*(keys(plan(study, [0, 1, 2])) for study in known.values()))
    assert len(everything) == 57  # of 81 that the studies ask for one by one: docs/studies.md counts on it


def test_a_runs_name_is_what_it_is_trained_with() -> None:
    def of(*overrides: str, seed: int = 0, threads: int = 1) -> str:
        return plan(small_study(), [seed], overrides, threads=threads)[0].run.key

    plain = of()
    assert of(threads=2) == plain
    assert of("train.log_every=1", "sampling.num_inference_steps=3") == plain
    for other in (of(seed=1), of("optim.lr=1e-3"), of("train.steps=6"), of("model.rope=none")):
        assert other != plain


def test_a_branch_decays_from_the_trunks_checkpoint() -> None:
    half, end, decayed = plan(branching_study(), [7])
    assert half.run.key == end.run.key
    assert (half.step, end.step, decayed.step) == (2, 5, None)
    assert half.run.keep == (2, 5)
    assert half.run.recipe.train.checkpoint_every == 1
    assert decayed.run.parent is not None
    assert decayed.run.parent.key == half.run.key
    assert (decayed.run.start, decayed.run.recipe.train.steps) == (2, 4)
    assert decayed.run.recipe.optim.decay_fraction == 0.5
    assert decayed.run.recipe.seed == 7


@pytest.mark.parametrize(
    ("seeds", "overrides", "message"),
    [
        ([], [], "--seeds"),
        ([1, 1], [], "--seeds"),
        ([0], ["model.block=[2, 2]"], "the study itself sets"),
        ([0], ["model={grid: [8, 8], block: [4, 4]}"], "the study itself sets"),
        ([0], ["seed=3"], "--seeds"),
        ([0], ["train.threads=3"], "--threads"),
        ([0], ["optim.lrr=3"], "did you mean 'lr'"),
        ([0], ["train.steps=0"], "train.steps"),
    ],
)
def test_mistakes(seeds: list[int], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(small_study(), seeds, overrides)


def test_too_few_steps_for_a_decay() -> None:
    with pytest.raises(ConfigError, match="is no step"):
        plan(branching_study(), [0], ["train.steps=1"])
    brief = Branch(CONSTANT, 0.4, 0.45)
    with pytest.raises(ConfigError, match="no step of its own"):
        plan(small_study("brief", (Arm("a", branch=brief), Arm("b", CONSTANT, x=1))), [0])


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigError, match="did you mean 'context'"):
        find_study("contex", DIGITS)
    with pytest.raises(ConfigError, match="--on digits"):
        find_study("ar-length-video", SETTINGS["mnist"])
    with pytest.raises(ConfigError, match="digits, mnist, cifar10"):
        find_setting("imagenet")
