"""`acdit analyze` as it is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acdit.analysis.mask_picture import OWN, READS
from acdit.cli import main
from tests.test_pipelines import make_pipeline
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("analyze") / "run"
    run(tiny_recipe(train__steps=2), path)
    return path


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lively") / "model"
    make_pipeline().save_pretrained(path)
    return path


def drawn(path: Path) -> bool:
    """Whether there is a picture with something on it."""
    return len(Image.open(path).convert("RGB").getcolors(1 << 20) or []) > 50


def require_provenance(figures: dict[str, object]) -> None:
    for name in ("command", "versions", "machine"):
        assert figures[name], name
    assert "commit" in figures


def test_flops_of_a_recipe_and_of_the_model_it_made(trained: Path, tmp_path: Path) -> None:
    results = []
    for index, subject in enumerate([str(trained / "model"), str(trained / "recipe.yaml")]):
        output = tmp_path / f"flops{index}.json"
        assert main(["analyze", "flops", subject, "--steps", "3", "--output", str(output)]) == 0
        assert drawn(output.with_suffix(".png"))
        results.append(json.loads(output.read_text()))
        require_provenance(results[-1])
    for name in ("sampling", "training_forward", "training_step", "saving", "layer"):
        assert results[0][name] == results[1][name]
    figures = results[0]
    assert max(abs(value) for value in figures["sampling"]["apart"].values()) <= 0.02
    assert abs(figures["training_step"]["apart"]) <= 0.02
    assert [row["block"] for row in figures["saving"]] == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert figures["saving"][-1]["layers"]["counted"] is None  # 64 blocks are more than are counted
    for row in figures["saving"][:-1]:
        assert row["layers"]["counted"] == pytest.approx(row["paper"], abs=1e-9)


def test_flops_of_text_and_of_chosen_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "f.json"
    text = ["openwebtext-8", "model.vocab_size=50", "model.num_layers=1", "model.num_attention_heads=1"]
    assert main(["analyze", "flops", *text, "--blocks", "256", "1024", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert (figures["num_inference_steps"], figures["guided"]) == (8, False)
    assert figures["sampling"]["counted"] is None  # 128 blocks
    assert [row["block"] for row in figures["saving"]] == [[256], [1024]]
    assert "too many blocks" in capsys.readouterr().out


def test_memory_is_measured_beside_the_closed_forms(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = ["analyze", "memory", str(trained / "model"), "--output", str(output), "--blocks", "8x8", "4x4"]
    assert main([*command, "--micro-batch", "4"]) == 0
    figures = json.loads(output.read_text())
    require_provenance(figures)
    assert drawn(output.with_suffix(".png"))
    for row in figures["by_block"]:
        assert row["activations"]["apart"] == pytest.approx(0, abs=0.1)
        assert row["sampling_peak"]["measured"] > row["sampling"]["cache"]
    assert main([*command, "--no-measure"]) == 0
    assert json.loads(output.read_text())["by_block"][0]["activations"]["measured"] is None


def test_a_mask_is_drawn_and_says_where_its_pairs_are(tmp_path: Path) -> None:
    output = tmp_path / "mask.png"
    layout = ["--grid", "4", "4", "4", "--block", "1", "4", "4", "--window", "1", "--sinks", "1", "--copies", "2"]
    assert main(["analyze", "mask", *layout, "--unit", "block", "--output", str(output)]) == 0
    figures = json.loads(output.with_suffix(".json").read_text())
    require_provenance(figures)
    pixels, (left, top), cell = np.asarray(Image.open(output)), figures["origin"], figures["cell"]
    assert tuple(pixels[top, left]) == READS
    assert tuple(pixels[top + 11 * cell - 1, left + 11 * cell - 1]) == OWN
    clean, noisy = 1 + 2 + 3, 2 * (1 + 2 + 3 + 3)  # with window 1 and a sink a block sees itself and at most two
    assert figures["pairs"] == (clean + noisy) * 16**2
    assert main(["analyze", "mask", "digits", "--output", str(tmp_path / "digits.png")]) == 0


def test_the_loss_of_a_model_on_a_split(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "loss.json"
    command = ["analyze", "loss", str(trained / "model"), "data.split=held_out", "--num-samples", "20"]
    assert main([*command, "--points", "5", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    require_provenance(figures)
    assert drawn(output.with_suffix(".png"))
    assert (figures["samples"], figures["samples_of_the_split"], figures["split"]) == (20, 500, "held_out")
    bound = figures["bound"]
    assert "pixels of 8 bits" in bound["protocol"]
    assert bound["dimensions"] == 64
    assert len(bound["by_block"]) == 4
    low, high = bound["interval"]
    assert low < bound["bits_per_dim"] < high
    assert np.shape(figures["loss_over_timesteps"]["loss"]) == (5, 4)
    assert figures["loss_over_timesteps"]["timesteps"] == [100, 300, 500, 700, 900]
    assert figures["labels"].startswith("the data's")
    assert "bits a dimension ≤" in capsys.readouterr().out
    # The same draws, cut into other batches, without labels, and one draw: no interval.
    again = tmp_path / "again.json"
    assert main([*command, "--points", "5", "--batch-size", "7", "--output", str(again)]) == 0
    assert json.loads(again.read_text())["bound"]["bits_per_dim"] == pytest.approx(bound["bits_per_dim"], rel=1e-4)
    assert main([*command, "--labels", "none", "--draws", "1", "--output", str(again)]) == 0
    unlabelled = json.loads(again.read_text())
    assert unlabelled["labels"].startswith("none")
    assert unlabelled["bound"]["interval"] == [None, None]


def test_a_model_of_flow_has_a_curve_and_no_bound(tmp_path: Path) -> None:
    run(tiny_recipe(train__steps=1, corruption__prediction_type="flow_prediction"), tmp_path / "run")
    output = tmp_path / "loss.json"
    command = ["analyze", "loss", str(tmp_path / "run" / "model"), "data.split=held_out", "--num-samples", "3"]
    assert main([*command, "--points", "2", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["bound"] is None
    assert "ODE" in figures["no_bound_because"]
    assert len(figures["loss_by_block"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops", "nothing"], "no such recipe"),
        (["flops", "digits", "--output", "x.txt"], "ends in .json"),
        (["flops", "digits", "--blocks", "3x3"], "does not divide"),
        (["flops", "digits", "--blocks", "big"], "like 16x16"),
        (["flops", "openwebtext-8"], "model.vocab_size"),
        (["flops", "EMPTY"], "no config.json"),
        (["flops", "MODEL", "model.num_layers=3"], "a model is as it is"),
        (["memory", "openwebtext-8", "model.vocab_size=50"], "--no-measure"),
        (["loss", "EMPTY"], "no model_index.json"),
        (["loss", "MODEL"], "no recipe.yaml"),
        (["loss", "MODEL", "--data", "text"], "a model of text"),
        (["loss", "MODEL", "--data", "cifar10", "data.kind=digits", "data.channels=1"], "expected"),
        (["mask"], "--grid and --block"),
        (["mask", "digits", "--window", "2"], "a layout of its own"),
        (["mask", "--grid", "8", "--block", "4", "--sinks", "1"], "without a window"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: list[str], message: str, lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "MODEL": str(lively)}
    assert main(["analyze", *(places.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_without_matplotlib_it_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", "flops", "digits"]) == 2
    assert "acdit analyze flops; found no matplotlib" in capsys.readouterr().err


def test_common_options_stand_before_or_behind_the_verb(tmp_path: Path) -> None:
    from acdit.cli import _parser

    parsed = [
        _parser().parse_args(text.split())
        for text in ("analyze --debug mask digits", "analyze mask digits --debug", "analyze mask digits")
    ]
    assert [options.debug for options in parsed] == [True, True, False]
