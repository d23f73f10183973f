"""The model card: everything it says is known, and what is not known is said."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import yaml

from acdit.hub.card import Origin, model_card
from acdit.hub.samples import Samples, kind_of
from acdit.recipe import Recipe, load_recipe
from tests.hub.models import FIGURES, pipeline_of

NOTHING = Origin("digits", "owner/digits", None, None, False, None, "abc", None)


def card(kind: str = "image", samples: Samples | None = None, **known: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    made = model_card(pipeline_of(kind), dataclasses.replace(NOTHING, **known), samples or Samples(why_none="None."))
    _, front, text = made.split("---\n", 2)
    return yaml.safe_load(front), text


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, list(overrides))


@pytest.mark.parametrize(
    ("kind", "task"),
    [("image", "unconditional-image-generation"), ("text", "text-generation"), ("video", None)],
)
def test_the_front_matter_is_what_the_hub_reads(kind: str, task: str | None) -> None:
    front, _ = card(kind, classes=True, license_id="cc-by-4.0")
    assert front["library_name"] == "diffusers"
    assert front["license"] == "cc-by-4.0"
    assert front.get("pipeline_tag") == task
    assert {"acdit", "classification"} <= set(front["tags"])
    assert card(kind)[0]["license"] == "unknown"


def test_nothing_is_made_up() -> None:
    _, text = card()
    figures = text.partition("## Figures")[2].partition("##")[0]
    assert figures.strip() == "None: no metrics.json lay beside the model, so nothing is claimed."
    assert text.count("Not known: no recipe.yaml lay beside the model.") == 2
    assert "not recorded" in text
    assert "For the weights none was named" in text


def test_figures_stand_as_they_were_measured() -> None:
    _, text = card(metrics=FIGURES)
    for line in (
        "| `accuracy` | 0.9312 | >= 0.9 |", "| `interval` | 0.91 · 0.95 |  |",
        "How they were measured: 100 \\| pictures",
        "| at commit | `c0ffee` |", "| measured by | `acdit demo` |", "| on | abacus, 2 cores |",
    ):  # fmt: skip
        assert line in text
    assert "`long`" not in text
    assert "`seed`" not in text
    assert "not recorded" not in text
    assert "no figures" in card(metrics={"note": "x", "fine": True, "none": None})[1]
    assert "| `x` | nan |" in card(metrics={"x": float("nan"), "targets": 3, "versions": 1, "machine": 2})[1]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (("digits",), "CC BY 4.0"),
        (("moving-digits",), "Clips of moving digits"),
        (("text",), "Shakespeare"),
        (("cifar10", "data.root=/home/me/secret/photos"), "named `photos`"),
        (("digits", "data.kind=hf", "data.root=owner/data", "data.channels=1"), "huggingface.co/datasets/owner/data"),
    ],
)
def test_data_are_named(made: tuple[str, ...], told: str) -> None:
    known = recipe(*made)
    front, text = card(recipe=known)
    assert told in text
    assert "/home/me" not in text
    assert front.get("datasets") == (["owner/data"] if known.data.kind == "hf" else None)


def test_the_recipe_is_told() -> None:
    _, text = card(recipe=recipe("digits", "train.init_from=/home/me/old"))
    for part in ("| recipe | digits |", "1,000 steps of 16 samples", "decay 0.999", "acdit train recipe.yaml", "`old`"):
        assert part in text
    assert "/home/me" not in text
    tuned = card(recipe=recipe("finetune-digits"))[1]
    assert "acdit finetune recipe.yaml" in tuned


def test_samples_cannot_end_their_block() -> None:
    text = card("text", Samples("pipe()", texts=("a ``` b\n---\n# c", "d")))[1]
    assert "````text\na ``` b" in text
    assert "next seed" in text


def test_lines_of_code_name_the_place() -> None:
    _, text = card(classes=True)
    assert 'ACDiTPipeline.from_pretrained("owner/digits")' in text
    assert 'DiffusionPipeline.from_pretrained("owner/digits", trust_remote_code=True)' in text
    assert "ACDiTClassifier" in text
    odd = 'a "quoted" name'
    assert json.dumps(odd) in card(place=odd)[1]


def test_kinds() -> None:
    assert [kind_of(pipeline_of(kind)) for kind in ("image", "latent", "video", "text")] == [
        "image", "image", "video", "text",
    ]  # fmt: skip
