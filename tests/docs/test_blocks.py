"""The code on the pages runs: every Python block, and every shell block that is tagged as tested.

A page's blocks run in order, in one namespace and one folder, where small models, pictures and an autoencoder lie under
the names that the pages use. Training is cut to a few steps; nothing else is changed.
"""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import pytest

from acdit.cli import main
from acdit.recipe import load_recipe
from tests import autoencoders
from tests.data.pictures import png
from tests.docs.pages import DOCS, PAGES, Block, blocks_of, commands_of, name_of
from tests.training.runs import run, tiny_recipe

SHORT = ["train.steps=2", "train.sample_every=null", "train.tensorboard=false"]
RUNNABLE = [
    page for page in PAGES if DOCS in page.parents and any(block.tested or block.language == "python"
                                                         for block in blocks_of(page))
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted, as small as it can be."""
    folder = tmp_path_factory.mktemp("pages")
    sizes = {"model__num_layers": 2, "train__steps": 1, "optim__lr": 1e-3}
    run(tiny_recipe(**sizes), folder / "runs" / "demo")
    text = ["train.steps=1", "train.sample_every=null", "train.tensorboard=false", "model.num_layers=1",
            "model.num_attention_heads=1", "optim.batch_size=2"]  # fmt: skip
    run(load_recipe("text", text), folder / "runs" / "shakespeare")
    autoencoders.kl().save_pretrained(folder / "vae")
    for label in ("cat", "dog"):
        for split, count in (("train", 8), ("val", 2)):
            place = folder / "pictures" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                (place / f"{index}.png").write_bytes(png(20 * index + 40, (16, 16)))
    (folder / "start.txt").write_text("ROMEO:", encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_a_pages_code_runs(page: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "yaml" and block.code.startswith("# "):  # a file: its name stands in the first line
            Path(block.code.splitlines()[0].removeprefix("# ")).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            _run_python(block, namespace)
        elif block.tested:
            _run_shell(block)


def _run_python(block: Block, namespace: dict[str, Any]) -> None:
    lines = block.code.splitlines(keepends=True)
    linecache.cache[block.where] = (len(block.code), None, lines, block.where)  # a traceback shows the page's lines
    exec(compile(block.code, block.where, "exec"), namespace)


def _run_shell(block: Block) -> None:
    for command in commands_of(block):
        assert command[0] == "acdit", block.where
        arguments = command[1:]
        if arguments[0] in ("train", "finetune"):
            arguments = [*arguments, *SHORT]
        assert main(arguments) == 0, f"{block.where}: {' '.join(command)}"


def test_there_is_something_to_run_of_both_kinds() -> None:
    blocks = [block for page in RUNNABLE for block in blocks_of(page)]
    assert sum(block.language == "python" for block in blocks) > 10
    assert sum(block.tested and block.language == "bash" for block in blocks) > 8


def test_the_new_modality_is_at_most_60_lines() -> None:
    """docs/extending.md promises it."""
    (block,) = [block for block in blocks_of(DOCS / "extending.md") if block.language == "python"]
    assert len(block.code.splitlines()) <= 60


def test_python_that_fails_names_its_page(tmp_path: Path) -> None:
    block = Block(DOCS / "index.md", 7, "python", "x = 1\nassert x == 2\n", False)
    with pytest.raises(AssertionError) as caught:
        _run_python(block, {})
    assert str(caught.traceback[-1].path).endswith("docs/index.md:7")
