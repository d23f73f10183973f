"""Recipes: strict reading, exact round trips, errors that name the path, what was found and the nearest key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from acdit.cli import main
from acdit.errors import ConfigError
from acdit.recipe import (
    CHOICES,
    RANGES,
    Recipe,
    difference,
    flatten,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
)
from acdit.strict_yaml import read_yaml

MINIMAL = """
name: x
model: {grid: [8, 8], block: [4, 4], num_layers: 2, num_attention_heads: 2, attention_head_dim: 16}
data: {kind: digits}
optim: {batch_size: 8, lr: 2e-4}
train: {steps: 10}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file


def test_overrides_are_yaml_and_win(path: Path) -> None:
    recipe = load_recipe(
        path, ["optim.lr=1e-3", "model.block=[2, 4]", "optim.max_grad_norm=null", "data.flip=true", "seed=7"]
    )
    assert recipe.optim.lr == 1e-3
    assert recipe.model.block == [2, 4]
    assert recipe.optim.max_grad_norm is None
    assert recipe.data.flip is True
    assert recipe.seed == 7
    assert load_recipe(path, ["train.log-every=3"]).train.log_every == 3


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", ".0002", "2.0e-4", "+2e-4", "0.000_2"])
def test_numbers_are_numbers(path: Path, text: str) -> None:
    assert load_recipe(path, [f"optim.lr={text}"]).optim.lr == pytest.approx(2e-4)


BAD: dict[str, tuple[str, ...]] = {
    "optim.lrr=1": ("optim.lrr", "did you mean 'lr'"),
    "modle.grid=[8]": ("modle", "did you mean 'model'"),
    "optim.schedule=wds": ("optim.schedule", "'wds'", "did you mean 'wsd'"),
    "model.preset=XLL": ("model.preset", "did you mean 'XL'"),
    "optim.lr=.nan": (".nan", "finite"),
    "optim.lr=-.inf": ("-.inf", "finite"),
    "optim.lr=1e999": ("1e999", "finite"),
    "optim.lr=nan": ("optim.lr", "a number"),
    "optim.lr=-1": ("optim.lr", "at least 0"),
    "optim.batch_size=true": ("optim.batch_size", "an integer"),
    "optim.batch_size=1.5": ("optim.batch_size", "an integer"),
    "optim.batch_size='8'": ("optim.batch_size", "an integer"),
    "optim.batch_size=0": ("optim.batch_size", "at least 1"),
    "optim.accumulation=3": ("optim.accumulation", "divisor"),
    "optim.betas=[0.9]": ("optim.betas", "2 numbers"),
    "optim.betas=[0.9, 1.0]": ("optim.betas", "below 1"),
    "optim.label_dropout=1": ("optim.label_dropout", "below 1"),
    "ema.decays=[]": ("ema.decays", "at least one"),
    "model.grid=8": ("model.grid", "a list"),
    "model.grid=[8, a]": ("model.grid[1]", "an integer"),
    "train=3": ("train", "a mapping"),
    "train.x.y=3": ("train.x", "unknown key"),
    "train.steps.x=3": ("train.steps", "group of keys"),
    "train.epochs=3": ("train.steps, train.epochs", "both"),
    "train.steps=null": ("train.steps, train.epochs", "neither"),
    "train.gradient_checkpointing=true": ("train.gradient_checkpointing", "True (bool)", "none, elementwise, layers"),
    "name=3": ("name", "text"),
    "name=null": ("name", "text"),
    "optim": ("key.key=value",),
    "=3": ("key.key=value",),
    "optim..lr=3": ("key.key=value",),
    "optim.lr=!!python/object/apply:os.system [x]": ("a tag",),
    "optim.lr=!!float 3": ("a tag",),
    "optim.lr=&a 3": ("anchor",),
    "optim.lr=*a": ("alias",),
    "optim={lr: 1, lr: 2}": ("'lr' twice",),
    "optim={1: 2}": ("the key 1",),
    "optim.lr=[": ("invalid YAML",),
    'optim.lr="': ("invalid YAML",),
    "optim.lr=1" + "0" * 400: ("optim.lr", "fits a float"),
    "optim.lr=1:30": ("optim.lr", "'1:30'", "a number"),
    "optim.batch_size=010": ("optim.batch_size", "an integer"),
    "optim.batch_size=0x10": ("optim.batch_size", "an integer"),
    "corruption.beta_schedule=foo": ("corruption.beta_schedule", "linear"),
    "corruption.beta_end=2": ("corruption.beta_end", "below 1"),
    "model.mlp_ratio=-1": ("model.mlp_ratio", "at least"),
    "model.num_layers=null": ("model.num_layers", "model.preset"),
}


@pytest.mark.parametrize("override", BAD)
def test_mistakes_name_the_path_what_was_found_and_the_fix(path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [override])
    for part in BAD[override]:
        assert part in str(error.value)


def test_duplicate_keys_and_bombs_in_files(tmp_path: Path) -> None:
    for name, text, part in (
        ("twice", MINIMAL + "name: y\n", "'name' twice"),
        ("bomb", "a: &a [x]\nb: &b [*a, *a]\n", "anchor"),
        ("deep", "[" * 5000, "invalid YAML"),
        ("huge", "a: " + "x" * (2 << 20), "at most"),
        ("list", "- 1\n- 2\n", "mapping"),
        ("empty", "", "mapping"),
        ("two", MINIMAL + "---\na: 1\n", "invalid YAML"),
        ("missing", MINIMAL.replace("data: {kind: digits}\n", ""), "data"),
    ):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=part):
            load_recipe(file)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_recipe("digit")


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_never_a_crash(text: str) -> None:
    try:
        value = read_yaml(text, "fuzz")
        recipe_from_dict(value)
    except ConfigError:
        pass


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
)


@given(
    st.sampled_from(
        sorted(flatten(recipe_to_dict(recipe_from_dict(yaml.safe_load(MINIMAL.replace("2e-4", "2.0e-4"))))))
    ),
    LEAVES,
)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_is_read_or_refused_by_path(dotted: str, value: Any) -> None:
    data = recipe_to_dict(recipe_from_dict(yaml.safe_load(MINIMAL.replace("2e-4", "2.0e-4"))))
    *groups, last = dotted.split(".")
    here = data
    for group in groups:
        here = here[group]
    here[last] = value
    refusal = ""
    try:
        recipe = recipe_from_dict(data)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert any(path in refusal for path in (last, "train.steps", "optim.accumulation", "model.preset"))
    else:
        assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_choices_and_ranges_speak_of_fields_that_exist(path: Path) -> None:
    fields = set(flatten(recipe_to_dict(load_recipe(path, ["classification={}"]))))
    assert set(CHOICES) | set(RANGES) <= fields


def test_differences_are_named(path: Path) -> None:
    one = load_recipe(path)
    other = dataclasses.replace(one, seed=3, optim=dataclasses.replace(one.optim, lr=1.0))
    assert difference(one, other) == {"optim.lr": (2e-4, 1.0), "seed": (0, 3)}
    assert difference(one, one) == {}
    assert isinstance(one, Recipe)


@pytest.mark.parametrize("override", ["optim.lrr=1", "optim.lr=1e999", "optim.lr=!!python/name:os.system"])
def test_the_command_line_ends_with_2_and_one_line(
    path: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(path), override]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("acdit: error: ")
    assert errors.count("\n") == 1


def test_a_size_is_one_edge_or_two() -> None:
    assert load_recipe("mnist", ["data.size=32"]).data.size == 32
    two = load_recipe("mnist", ["data.size=[32, 48]"])
    assert two.data.size == [32, 48]
    assert recipe_from_dict(recipe_to_dict(two)) == two
    for wrong in ("[32]", "[32, 48, 3]", "[32, 0]", "[32, x]", "large", "0"):
        with pytest.raises(ConfigError, match=r"data\.size"):
            load_recipe("mnist", [f"data.size={wrong}"])
