"""The README is a claim: its tagged blocks run as they stand, in a folder where the demo has been."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import run, tiny_recipe

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As after `make demo`, with a model of a few steps."""
    path = tmp_path_factory.mktemp("readme")
    run(tiny_recipe(train__steps=1), path / "runs" / "demo")
    return path


def test_there_are_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_a_tagged_block_runs_as_it_stands(folder: Path, language: str, code: str) -> None:
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = ["three.png"] if language == "python" else ["out/grid.png", "out2/grid.png"]
    assert all((folder / name).is_file() for name in made)


def test_every_file_and_picture_it_names_is_there() -> None:
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / link).is_file(), link
    table = TEXT.split("## Where things are")[1]
    for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", table):
        assert (ROOT / name).exists() or (ROOT / "src/acdit" / name).exists(), name
