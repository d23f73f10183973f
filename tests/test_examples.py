"""Every example runs as a script on small models and leaves what it promises; none is longer than a page."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from acdit import ACDiTClassifier, ACDiTPipeline, ACDiTTextPipeline
from acdit.recipe import load_recipe
from tests.data.pictures import png
from tests.docs.test_commands import require_script
from tests.training.runs import run, tiny_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
MOST_LINES = 60
SMALL = ["train.sample_every=null", "train.tensorboard=false", "model.num_layers=1", "model.num_attention_heads=1",
         "model.attention_head_dim=16", "optim.batch_size=2", "train.steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models of a step, by the built-in models' names."""
    place = tmp_path_factory.mktemp("models")
    run(tiny_recipe(train__steps=1, model__num_layers=2), place / "digits")
    for name in ("moving-digits", "text"):
        run(load_recipe(name, SMALL), place / name)
    return {name: str(place / name / "model") for name in ("digits", "moving-digits", "text")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As `python examples/NAME.py ARGUMENTS` does."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def documentation(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_a_page_and_says_how_it_is_run(path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    commands = re.findall(r"^ +python (examples/.+)$", documentation(path), re.M)
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == f"examples/{path.name}"
        require_script(words, monkeypatch)
        monkeypatch.undo()


def test_the_table_lists_every_example() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\((\w+\.py)\)", table))) == [path.name for path in EXAMPLES]
    assert len(EXAMPLES) == 6


def test_train_on_your_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, value in (("cat", 40), ("dog", 200)):
        (here / "pictures" / label).mkdir(parents=True)
        for index in range(4):
            (here / "pictures" / label / f"{index}.png").write_bytes(png(value + index, (20, 18)))
    execute("train_on_your_folder", monkeypatch, "pictures", "--size", "16", "--steps", "2", "--output", "run")
    assert Image.open("run/samples.png").width > 8 * 64
    pipe = ACDiTPipeline.from_pretrained("run/model")
    assert pipe.get_label_ids(["cat", "dog"]) == [0, 1]
    assert pipe.transformer.layout.grid == (16, 16)


def test_train_on_your_folder_writes_the_digits_where_there_is_no_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute("train_on_your_folder", monkeypatch, "--steps", "1", "--output", "run")
    assert len(list((here / "run" / "digits" / "7").iterdir())) > 100
    assert (here / "run" / "model" / "model_index.json").is_file()


def test_continue_a_picture(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept stays; the rest is what the pipeline draws."""
    given = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    (here / "given.png").write_bytes(png(given))
    options = ("--model", models["digits"], "--keep", "3", "--labels", "1", "4", "--each", "2", "--steps", "2")
    execute("continue_a_picture", monkeypatch, *options, "--picture", "given.png")
    tiles = _tiles(Image.open("continued.png"), rows=2, columns=3)
    kept = np.ones((8, 8), dtype=bool)
    kept[4:, 4:] = False
    assert all((tile[kept] == given[kept]).all() for row in tiles for tile in row)
    assert len({tile.tobytes() for row in tiles for tile in row[1:]}) == 4
    execute("continue_a_picture", monkeypatch, *options, "--output", "drawn.png")
    assert Image.open("drawn.png").size == Image.open("continued.png").size


def _tiles(grid: Image.Image, rows: int, columns: int, gap: int = 4, scale: int = 8) -> list[list[np.ndarray]]:
    """8×8 pictures of a grid with labels on its left."""
    pixels, edge = np.asarray(grid.convert("L")), 8 * scale
    left = pixels.shape[1] - columns * (edge + gap)
    corners = [[(gap + row * (edge + gap), left + column * (edge + gap)) for column in range(columns)]
               for row in range(rows)]  # fmt: skip
    return [[pixels[top : top + edge : scale, start : start + edge : scale] for top, start in row] for row in corners]


@pytest.mark.parametrize("name", ["stream.gif", "stream.mp4", "frames"])
def test_endless_stream(
    name: str, here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith(".mp4"):
        pytest.importorskip("av")
    options = ("--model", models["moving-digits"], "--steps", "2", "--blocks", "6", "--every", "2", "--output", name)
    execute("endless_stream", monkeypatch, *options)
    told = re.findall(r"block \d+: class (\d), .* s, (.*)", capsys.readouterr().out)
    assert [label for label, _ in told] == list("337711")
    assert len({cache for _, cache in told}) == 1  # the cache does not grow
    if name == "stream.gif":
        with Image.open(name) as film:
            assert sum(1 for _ in ImageSequence.Iterator(film)) == 24
    else:
        assert Path(name).stat().st_size > 0


def test_text(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", models["text"], "--prompt", "ROMEO:", "--length", "20", "--sequences", "2")
    execute("text", monkeypatch, *options)
    written, told = Path("text.txt").read_text(encoding="utf-8"), capsys.readouterr().out
    pipe = ACDiTTextPipeline.from_pretrained(models["text"])
    assert [written] == pipe("ROMEO:", 20, generator=0, temperature=0.8).texts
    assert written in told
    found = re.search(r"at most (\d+\.\d+) bits a character of (\d+) held-out", told)
    assert found is not None
    assert 3 < float(found[1]) < 7
    assert int(found[2]) == 256


def test_probe(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute("probe", monkeypatch, "--model", models["digits"], "--steps", "150", "--output", "probe")
    accuracy = re.findall(r"layers (.*): (\d\.\d+) of .*untrained model: (\d\.\d+)", capsys.readouterr().out)
    assert [layers for layers, *_ in accuracy] == ["[0]", "[1]", "[0, 1]"]
    assert float(accuracy[-1][1]) > 0.4  # chance is 0.1
    classifier = ACDiTClassifier.from_pretrained("probe")
    assert classifier.classifier.head.config.layers == [0, 1]


def test_custom_layout(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A twentieth of its training already forecasts better than standing still, an untrained model far worse."""
    errors = {}
    for steps in (0, 150):
        execute("custom_layout", monkeypatch, "--steps", str(steps))
        found = re.search(r"forecast is (.*) °C off; .*, (.*) °C", capsys.readouterr().out)
        assert found is not None
        errors[steps], still = float(found[1]), float(found[2])
    assert errors[150] < 0.8 * still < errors[0]
    assert Image.open("heat.png").width > 8 * 96


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_at_full_length(
    path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, with the built-in models."""
    execute(path.stem, monkeypatch)
    told = capsys.readouterr().out
    if path.stem == "custom_layout":
        found = re.search(r"forecast is (.*) °C off; .*, (.*) °C", told)
        assert found is not None
        assert float(found[1]) < 0.35 * float(found[2])
    elif path.stem == "probe":
        pairs = re.findall(r"layers \[\d\]: (\d\.\d+) of .*untrained model: (\d\.\d+)", told)
        assert float(pairs[-1][0]) > max(0.8, float(pairs[-1][1]))
