"""Training from files: what the data loader does must not be seen in the result."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acdit.errors import DataError
from acdit.recipe import Recipe
from tests.training.runs import run, state_hash, tiny_recipe

MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 3, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 8, "num_classes": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of five colour pictures, larger than the model's grid."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{index}.png")
    return tmp_path / "pictures"


def recipe_for(root: Path, **data: Any) -> Recipe:
    return tiny_recipe(
        model=MODEL, data={"kind": "images", "root": str(root), "size": 8, "flip": True, **data}, train__steps=4
    )


def test_a_run_on_pictures_resumes_to_the_bit(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(folder)
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    assert state_hash(run(recipe, tmp_path / "cut", resume="latest")) == state_hash(whole)


def test_workers_and_zips_change_nothing(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    plain = state_hash(run(recipe_for(folder), tmp_path / "plain"))
    assert state_hash(run(recipe_for(folder, num_workers=2), tmp_path / "workers")) == plain
    assert state_hash(run(recipe_for(tmp_path / "pictures.zip"), tmp_path / "zip")) == plain


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_picture_stops_the_run_by_name(folder: Path, tmp_path: Path, num_workers: int) -> None:
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"dog/3\.png") as error:
        run(recipe_for(folder, num_workers=num_workers), tmp_path / "run")
    assert error.value.exit_code == 3
    assert "Traceback" not in str(error.value)  # torch puts a worker's whole traceback into the message
    assert "\n" not in str(error.value)


def test_a_corrupt_picture_within_the_limit_is_passed_over(folder: Path, tmp_path: Path) -> None:
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    one = state_hash(run(recipe_for(folder, max_bad_files=1), tmp_path / "one"))
    two = state_hash(run(recipe_for(folder, max_bad_files=1, num_workers=2), tmp_path / "two"))
    assert one == two
