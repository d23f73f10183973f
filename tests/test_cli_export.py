"""`acdit export` and the commands that take what it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from acdit.cli import main
from acdit.cli.models import averaging_of, is_text_model
from tests.hub.models import save
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of a trained model of digits and of texts."""
    base = tmp_path_factory.mktemp("cli-export")
    run(tiny_recipe(train__steps=2), base / "image")
    models = {"image": base / "image" / "model", "text": save("text", base / "text")}
    for kind, model in models.items():
        steps = ["--steps", "2"] if kind == "image" else []
        assert main(["export", str(model), "--hub", str(base / f"hub-{kind}"), "--samples", "1", *steps]) == 0
    return {kind: base / f"hub-{kind}" for kind in models}


def test_help_needs_no_torch() -> None:
    code = "import sys; from acdit.cli import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'diffusers', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
    assert "example:\n  acdit export" in done.stdout
    assert "exit codes:" in done.stdout


def test_what_it_says(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = folders["image"] / "recipe.yaml"
    own = tmp_path / "run"
    own.mkdir()
    (own / "recipe.yaml").write_text(recipe.read_text().replace("root: null", "root: /home/me/photos"))
    (own / "model").symlink_to(folders["image"].parent / "image" / "model")
    command = ["export", str(own / "model"), "--hub", str(tmp_path / "out"), "--samples", "0"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"done: {tmp_path / 'out'}" in told
    assert "nothing to say about: metrics.json, a licence" in told
    assert "data.root=/home/me/photos" in told
    assert "None were asked for." in (tmp_path / "out" / "README.md").read_text()


def test_the_other_commands_take_it(folders: dict[str, Path], tmp_path: Path) -> None:
    image, text = str(folders["image"]), str(folders["text"])
    assert is_text_model(text)
    assert not is_text_model(image)
    assert averaging_of(image)["decay"] == 0.99
    out = str(tmp_path / "out")
    assert main(["sample", image, "--labels", "1", "--steps", "2", "--output", out]) == 0
    assert main(["sample", text, "--prompt", "ab", "--max-new-tokens", "3", "--output", out]) == 0
    result = tmp_path / "metrics.json"
    measured = ["evaluate", image, "--reference", "digits:held_out", "--extractor", "pixels", "--num-samples", "80"]
    assert main([*measured, "--steps", "1", "--output", str(result)]) == 0
    assert json.loads(result.read_text())["ema"]["decay"] == 0.99
    assert main(["analyze", "flops", image, "--output", str(tmp_path / "flops.json")]) == 0
    tuned = ["finetune", "finetune-digits", f"model={image}", "train.steps=1", "train.sample_every=null"]
    assert main([*tuned, "train.tensorboard=false", "optim.warmup_steps=0", "--output", str(tmp_path / "tuned")]) == 0
    assert not (tmp_path / "tuned" / "model" / "README.md").exists()  # it told of the model before
    assert main(["export", str(tmp_path / "tuned" / "model"), "--hub", str(tmp_path / "hub"), "--samples", "0"]) == 0
    from_export = [
        "evaluate",
        str(tmp_path / "hub"),
        "data.split=held_out",
        "--classification",
        "--output",
        str(result),
    ]
    assert main(from_export) == 0  # the data of the recipe inside
    assert "acdit finetune recipe.yaml" in (tmp_path / "hub" / "README.md").read_text()


def test_the_page_takes_it(folders: dict[str, Path]) -> None:
    from acdit.app.models import ServedModel
    from acdit.cli import _parsed
    from acdit.cli.app import _pipeline

    options = _parsed(["app", *map(str, folders.values())])
    kinds = [ServedModel(name, _pipeline(options, name)).kind for name in options.models]
    assert kinds == ["image", "text"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["image", "--private"], 2, "--push"),
        (["image", "--samples", "0", "--steps", "2000"], 2, "at most 1000"),
        (["text", "--steps", "3"], 2, "a model of text"),
        (["text", "--guidance-scale", "3"], 2, "a model of text"),
        (["text", "--vae", "x"], 2, "a model of text"),
        (["missing"], 2, "model_index.json"),
    ],
)
def test_wrong_options(
    options: list[str], code: int, told: str, folders: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, *rest = options
    place = folders.get(model, tmp_path / model)
    assert main(["export", str(place), "--hub", str(tmp_path / "out"), *rest]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_overwritten_by_its_export(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = folders["image"].parent / "image" / "model"
    assert main(["export", str(model), "--hub", str(model)]) == 5
    assert "no export of a model" in capsys.readouterr().err
