"""`acdit evaluate` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acdit.cli import main
from acdit.errors import ConfigError
from acdit.evaluation.sweep import combinations, parse_axes, series_names
from tests.test_pipelines import make_pipeline
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "run"
    run(tiny_recipe(train__steps=2), path)
    return path / "model"


@pytest.fixture(scope="module")
def lively_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights everywhere: guidance and steps change its pictures."""
    path = tmp_path_factory.mktemp("lively") / "model"
    make_pipeline().save_pretrained(path)
    return path


def evaluate(samples: Path | str, output: Path, *more: str) -> list[str]:
    return [
        "evaluate", str(samples), "--reference", "digits:held_out", "--extractor", "pixels", "--steps", "2",
        "--output", str(output), *more,
    ]  # fmt: skip


def test_a_model_is_sampled_and_measured_and_everything_is_recorded(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    arguments = evaluate(model, output, "--num-samples", "12", "--seed", "3", "--chunk-size", "5")
    assert main(arguments) == 0
    metrics = json.loads(output.read_text())
    assert metrics["fid"] > 0
    assert (metrics["num_samples"], metrics["num_reference"], metrics["seed"]) == (12, 500, 3)
    assert (metrics["num_inference_steps"], metrics["guidance_scale"]) == (2, 1.5)
    assert metrics["solver"] == "DPMSolverMultistepScheduler"
    assert metrics["ema"]["decay"] == 0.99
    assert metrics["extractor"]["name"] == "pixels"
    assert "commit" in metrics  # null outside a checkout
    for name in ("model_sha256", "command", "versions", "labels", "machine", "protocol"):
        assert metrics[name], name
    # The same pictures drawn first and measured from a file: the same figure.
    drawn = ["sample", str(model), "--num-samples", "12", "--seed", "3", "--steps", "2", "--chunk-size", "5"]
    assert main([*drawn, "--npz", str(tmp_path / "s.npz"), "--output", str(tmp_path / "out")]) == 0
    assert main(evaluate(tmp_path / "s.npz", tmp_path / "again.json")) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["fid"] == pytest.approx(metrics["fid"], rel=1e-9)
    assert (again["seed"], again["model_sha256"]) == (3, metrics["model_sha256"])


def test_a_sweep_over_two_settings_gives_one_file_and_a_plot(lively_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweeps = ["--sweep", "guidance_scale=1.0,2.5", "--sweep", "num_inference_steps=2,5"]
    assert main(evaluate(lively_model, tmp_path / "sweep.json", "--num-samples", "6", *sweeps)) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["sweep"] == {"guidance_scale": [1.0, 2.5], "num_inference_steps": [2, 5]}
    points = [(row["guidance_scale"], row["num_inference_steps"]) for row in result["results"]]
    assert points == [(1.0, 2), (1.0, 5), (2.5, 2), (2.5, 5)]
    assert len({row["fid"] for row in result["results"]}) == 4
    picture = Image.open(tmp_path / "sweep.png")
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    # A single point of it, measured alone, is the same.
    alone = evaluate(lively_model, tmp_path / "one.json", "--num-samples", "6", "--guidance-scale", "2.5")
    assert main(alone) == 0
    assert json.loads((tmp_path / "one.json").read_text())["fid"] == pytest.approx(
        result["results"][2]["fid"], rel=1e-9
    )


def test_a_grid_of_block_sizes_and_steps_is_a_sweep_over_models(
    lively_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    coarse = tmp_path / "coarse" / "model"
    make_pipeline(block=(4, 8)).save_pretrained(coarse)  # equal weights: only the block differs
    sweep = ["--sweep", "steps=1,2", "--num-samples", "6"]
    assert main(["evaluate", str(coarse), *evaluate(lively_model, tmp_path / "grid.json", *sweep)[1:]]) == 0
    result = json.loads((tmp_path / "grid.json").read_text())
    rows = [(row["block"], row["num_inference_steps"]) for row in result["results"]]
    assert rows == [([4, 8], 1), ([4, 8], 2), ([4, 4], 1), ([4, 4], 2)]
    assert result["samples"] == [str(coarse), str(lively_model)]
    assert len({row["fid"] for row in result["results"]}) == 4
    assert "block 4×8, num_inference_steps 2: FID" in capsys.readouterr().out
    assert main(evaluate(lively_model, tmp_path / "alone.json", "--num-samples", "6")) == 0
    assert json.loads((tmp_path / "alone.json").read_text())["fid"] == pytest.approx(result["results"][3]["fid"])


def test_lines_of_a_plot_have_names_of_their_own() -> None:
    assert series_names(["a/model", "b/model"], [(4, 4), (8, 8)]) == ["block 4×4", "block 8×8"]
    assert series_names(["a/model", "b/model"], [(4, 4), (4, 4)]) == ["a, block 4×4", "b, block 4×4"]
    assert series_names(["x/a/model", "y/a/model"], [(4, 4), (4, 4)]) == ["x/a/model", "y/a/model"]


@pytest.mark.campaign
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    assert main(evaluate(tmp_path / "s.npz", tmp_path / "one.json", "--chunk-size", "9")) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "acdit.cli",
        *evaluate(tmp_path / "s.npz", tmp_path / "two.json", "--chunk-size", "9"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["processes"] == 2
    for name in ("fid", "precision", "recall"):
        assert two[name] == pytest.approx(one[name], rel=1e-10), name


def test_the_self_test_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--self-test", "--extractor", "pixels", "--output", str(tmp_path / "s.json")]) == 0
    assert "sane" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "s.json").read_text())["noise"]) == 4


WRONG: dict[str, tuple[list[str], int, str]] = {
    "nothing": ([], 2, "SAMPLES"),
    "no reference": (["digits:train"], 2, "--reference"),
    "no extractor": (["digits:train", "--reference", "digits:held_out"], 2, "only together with its extractor"),
    "zoo": (["digits:train", "--reference", "digits:held_out", "--extractor", "timm/inception_v3"], 2, "zoo"),
    "sweep of pictures": (
        ["digits:train", "--reference", "digits:train", "--extractor", "pixels", "--sweep", "steps=1,2"], 2, "no model",
    ),
    "several without a sweep": (["digits:train", "digits:held_out", "--reference", "digits:train"], 2, "one --sweep"),
    "several, one no model": (
        ["./m", "digits:train", "--reference", "digits:train", "--extractor", "pixels", "--sweep", "steps=1,2"],
        2, "digits:train, which is no model",
    ),
    "sweep of something": (["x", "--sweep", "colour=1,2"], 2, "guidance_scale"),
    "too few": (
        ["digits:held_out", "--reference", "digits:train", "--extractor", "pixels", "--num-samples", "501"], 3, "501",
    ),
    "no such samples": (["x.npz", "--reference", "digits:train", "--extractor", "pixels"], 3, "x.npz"),
    "no such reference": (["digits:train", "--reference", "no/where", "--extractor", "pixels"], 3, "no/where"),
    "no such model": (["./nowhere", "--reference", "digits:train", "--extractor", "pixels"], 2, "./nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, part = WRONG[name]
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == code
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "texts",
    [["guidance_scale="], ["steps=1.5"], ["steps=0,1"], ["guidance_scale=nan"], ["steps=1,1"], ["steps=1", "steps=2"]],
)
def test_sweeps_that_make_no_sense(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_axes(texts)


def test_the_grid_of_a_sweep() -> None:
    axes = parse_axes(["guidance-scale=1.0,1.5", "steps=5"])
    assert combinations(axes) == [
        {"guidance_scale": 1.0, "num_inference_steps": 5},
        {"guidance_scale": 1.5, "num_inference_steps": 5},
    ]
    assert combinations([]) == [{}]


def test_without_matplotlib_a_sweep_says_so_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["evaluate", "x", "--sweep", "steps=1,2"]) == 2
    assert "acdit[eval]" in capsys.readouterr().err
