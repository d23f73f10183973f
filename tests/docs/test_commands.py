"""Every command in the README and on the pages is one: the real parser, recipe reader and Makefile take it."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from acdit.cli import _dashes, _parsed
from acdit.data.build import require_used
from acdit.errors import ConfigError
from acdit.evaluation.sweep import parse_axes
from acdit.recipe import Recipe, load_recipe, recipe_from_dict, shipped_recipes
from acdit.strict_yaml import read_yaml
from tests.docs.pages import PAGES, ROOT, Block, blocks_of, commands_of, name_of

SHELL = {"bash", "console", "sh", "shell"}
LANGUAGES = {*SHELL, "python", "yaml", "text"}
STANDS_FOR = {"RECIPE": "digits", "my.yaml": "digits"}
"""Shipped recipes in the place of names that are the reader's own and that no page writes down."""
WRITTEN = [block for page in PAGES for block in blocks_of(page) if block.language == "yaml"]
IGNORED = {"source", "cd"}
PIP = (["pip", "install"], ["python3", "-m", "venv"], ["hf", "auth", "login"])
_ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$")

LINES = [
    pytest.param(block, command, id=f"{block.where} {' '.join(command)[:50]}")
    for page in PAGES
    for block in blocks_of(page)
    if block.language in SHELL
    for command in commands_of(block)
]


@pytest.mark.parametrize(("block", "command"), LINES)
def test_every_command_is_one(
    block: Block, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    while _ASSIGNMENT.match(command[0]):
        command = command[1:]
    # Two commands of make may stand in one line, far apart.
    if command[0] == "make":
        targets = [word for word in command if word != "make" and not _ASSIGNMENT.match(word)]
        assert targets
        assert all(re.search(rf"^{re.escape(target)}:", _makefile(), re.M) for target in targets), command
    elif command[0] in ("acdit", "torchrun", "accelerate"):
        require_command(acdit_arguments(command))
    elif command[0] == "python" and command[1].startswith(("benchmarks/", "examples/")):
        require_script(command[1:], monkeypatch)
    elif command[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / command[3]).exists()
    elif command[0] == "python":
        assert (ROOT / command[1]).is_file()
    else:
        assert command[0] in IGNORED or any(command[: len(start)] == start for start in PIP), command


def acdit_arguments(command: list[str]) -> list[str]:
    """What stands behind the program, or behind its launcher."""
    if command[0] == "acdit":
        return command[1:]
    assert command.count("acdit.cli") == 1, "a launcher starts -m acdit.cli"
    place = command.index("acdit.cli")
    assert command[place - 1] == "-m"
    if command[0] == "torchrun":
        get_args_parser().parse_args(command[1 : place + 1])
    return command[place + 1 :]


def require_command(arguments: list[str]) -> None:
    """The parser takes it; the recipe's overrides are fields, used by its kind of data.

    Raises:
        SystemExit: no such command or option.
        ConfigError: no such recipe or field.
    """
    options = _parsed([_dashes(argument) for argument in arguments])
    assert callable(options.run)
    overrides = list(getattr(options, "overrides", ()))
    if arguments[0] in ("train", "finetune", "data", "plan"):
        given = [word for word in overrides if not word.startswith("model=")]
        another_kind = any(word.startswith("data.kind=") for word in given)
        recipe = _recipe("RECIPE" if another_kind and options.recipe == "my.yaml" else options.recipe, given)
        if another_kind and options.recipe == "my.yaml":
            recipe.data.channels = 3  # the stand-in's own setting
        require_used(recipe.data)
    elif arguments[0] == "evaluate":
        parse_axes(options.sweep)
        assert all(word.startswith("data.") for word in overrides)
        load_recipe("digits", overrides)
        if options.reference and options.reference in {*STANDS_FOR, *shipped_recipes()}:
            _recipe(options.reference, overrides)
    elif arguments[0] == "analyze":
        subject = getattr(options, "subject", None)
        _recipe(subject if subject in shipped_recipes() else "digits", overrides)


def _recipe(name: str, overrides: list[str]) -> Recipe:
    """A recipe by its name, or as a page writes it down: a YAML block that begins with the file's name."""
    for block in WRITTEN:
        if block.code.startswith(f"# {name}\n"):
            written = Path(name)
            written.write_text(block.code, encoding="utf-8")
            return load_recipe(written, overrides)
    return load_recipe(STANDS_FOR.get(name, name), overrides)


class _Parsed(Exception):
    """A program's options were read."""


def require_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The own parser of a benchmark or example takes what is written; nothing more is run."""
    script = ROOT / words[0]
    assert script.is_file()
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(_Parsed):
        runpy.run_path(str(script), run_name="__main__")


def _makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_their_language_and_none_is_indented(page: Path) -> None:
    """Whatever is code can be found by these tests."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block.where
        assert not block.tested or block.language in {"bash", "python"}, block.where
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert "```" not in text
    indented = re.findall(r"^\n(?: {4}|\t)\S.*$", text, re.M)
    assert not [line for line in indented if not line.strip().startswith(("options:", "members:"))]


@pytest.mark.parametrize("block", WRITTEN, ids=lambda block: block.where)
def test_every_yaml_block_is_a_recipe(block: Block) -> None:
    recipe_from_dict(read_yaml(block.code, block.where))


@pytest.mark.parametrize(
    "line",
    [
        "acdit train digits optim.learning_rate=1",
        "acdit train no-such-recipe",
        "acdit sample MODEL --guidence 2",
        "acdit evaluate MODEL --reference REF --sweep colour=1,2",
        "acdit train digits data.vae=x",
        "acdit train digits data.frames=7",
        "acdit nothing",
    ],
)
def test_a_line_with_what_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        require_command(line.split()[1:])


def test_an_option_that_a_benchmark_has_not_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        require_script(["benchmarks/bench.py", "--no-such-option"], monkeypatch)
