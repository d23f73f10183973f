"""Rows 25, 26 and 30 of the reliability bar at length: layouts, recipes as text, and weights that do not fit.

Every campaign has a short form of a few cases, which each run of the tests makes.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch

from acdit import BlockLayout
from acdit.cli import main
from acdit.convert import convert_reference, to_reference_state_dict
from acdit.errors import ConfigError, DataError
from acdit.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict, shipped_recipes
from acdit.strict_yaml import read_yaml
from acdit.training import Trainer
from tests.faults.campaigns import peak_megabytes, reset_peak, short_and_long
from tests.faults.conftest import Tally
from tests.test_convert import random_model, save

# --- row 25: blocks and patches that do not divide ------------------------------------------------------------------

EXTENTS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 30, 31, 32, 64, 97, 256)
HUGE = (2**31 - 1, 2**31, 2**61 - 1, 10**30)


@short_and_long(300, 50_000)
def test_a_layout_is_exact_or_names_both_sides_and_the_valid_sizes(cases: int, tally: Tally) -> None:
    rng = random.Random(25)
    for _ in range(cases):
        ndim = rng.randint(1, 4)
        grid = [rng.choice(EXTENTS) for _ in range(ndim)]
        # Divisors and others in equal parts, so that several axes are right often enough.
        patch = [rng.choice([d for d in range(1, g + 1) if g % d == 0] * 3 + [rng.choice(EXTENTS)]) for g in grid]
        tokens = [max(1, g // p) for g, p in zip(grid, patch, strict=True)]
        block = [rng.choice([d for d in range(1, t + 1) if t % d == 0] * 3 + [rng.choice(EXTENTS)]) for t in tokens]
        wrong_patch = next((axis for axis in range(ndim) if grid[axis] % patch[axis]), None)
        wrong_block = next((axis for axis in range(ndim) if tokens[axis] % block[axis]), None)
        if wrong_patch is None and wrong_block is None:
            layout = BlockLayout(grid, block, patch)
            assert layout.num_blocks * layout.block_tokens == layout.num_tokens
            assert all(n * b * p == g for n, b, p, g in zip(layout.block_grid, block, patch, grid, strict=True))
            tally["exact"] += 1
            continue
        part, sizes, whole, axis = (
            ("patch", patch, grid, wrong_patch) if wrong_patch is not None else ("block", block, tokens, wrong_block)
        )
        assert axis is not None
        with pytest.raises(ConfigError) as caught:
            BlockLayout(grid, block, patch)
        valid = [size for size in range(1, whole[axis] + 1) if whole[axis] % size == 0]
        for words in (f"layout.{part} {tuple(sizes)}", str(tuple(whole)), f"axis {axis}", f"expected one of {valid}"):
            assert words in str(caught.value)
        assert caught.value.exit_code == 2
        tally[f"a {part} refused"] += 1


@pytest.mark.parametrize("extent", HUGE)
def test_a_huge_grid_is_refused_at_once(extent: int) -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigError):
        BlockLayout((extent, 8), (2, 3))
    assert time.perf_counter() - started < 1


def test_a_huge_grid_in_a_recipe_ends_with_2_and_takes_no_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):  # imports what the second one needs
        Trainer(load_recipe("digits", ["model.grid=[16, 8]"]), tmp_path)
    before = reset_peak()
    assert main(["train", "digits", "model.grid=[2147483647, 8]", "--output", str(tmp_path)]) == 2
    assert "layout.block (4, 4) does not divide" in capsys.readouterr().err
    assert main(["train", "digits", "model.grid=[2147483644, 8]", "--output", str(tmp_path)]) == 2
    assert "model.grid" in capsys.readouterr().err
    assert peak_megabytes() - before < 100


# --- row 26: recipes as text ----------------------------------------------------------------------------------------

PIECES = (
    "!!python/object/apply:os.system [x]", "!!float 3", "&a ", "*a", "<<: ", "? ", "- ", ": ", "{", "}", "[", "]", ",",
    "'", '"', "|", ">", "#", "%YAML 9", "---", "...", "\t", "\r", "\n  ", "\x00", "\x85", "\u2028", "\ufeff", "\ud800",
    "\udcff", "🙂", ".nan", "-.inf", "1e999", "0x10", "1:30", "2026-11-25", "null", "~", "yes", "9" * 400, "[" * 300,
    "name: y\n", "model: {grid: [8, 8]}\n", "optim: {batch_size: 8, batch_size: 9}\n", "=", "\\", "@", "`", "!", "&",
    "*",
)  # fmt: skip


def _mangled(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(text) + 1), rng.randint(1, 30)
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:place] + text[place + length :]
        elif kind == 1:
            text = text[:place] + rng.choice(PIECES) + text[place:]
        elif kind == 2:
            text = text[:place] + text[place : place + length] * 2 + text[place + length :]
        elif kind == 3:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines) if rng.random() < 0.2 else lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "".join(lines)
        elif place < len(text):
            text = text[:place] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) + text[place + 1 :]
        if not text:
            return "{}"
    return text


@short_and_long(40, 15_000)
def test_a_mangled_recipe_is_read_or_refused_and_nothing_else(cases: int, tally: Tally) -> None:
    rng = random.Random(26)
    shipped = [
        resources.files("acdit").joinpath("recipes", f"{name}.yaml").read_text("utf-8") for name in shipped_recipes()
    ]
    for _ in range(cases):
        text = _mangled(rng.choice(shipped), rng)
        made: list[Recipe] = []
        refusal = ""
        try:
            made.append(recipe_from_dict(read_yaml(text, "mangled.yaml")))
        except ConfigError as error:
            refusal = str(error)
        if refusal:
            assert len(refusal) < 2000, refusal
            tally["refused"] += 1
            continue
        assert recipe_from_dict(recipe_to_dict(made[0])) == made[0]
        tally["read"] += 1


@short_and_long(40, 15_000)
def test_a_mangled_override_is_read_or_refused_and_nothing_else(cases: int, tally: Tally) -> None:
    rng = random.Random(27)
    overrides = ("optim.lr=1e-3", "model.block=[2, 4]", "data={kind: digits, channels: 1}", "train.steps=7", "name=x")
    for _ in range(cases):
        given = [_mangled(override, rng) for override in rng.sample(overrides, rng.randint(1, 2))]
        with contextlib.suppress(ConfigError):
            load_recipe("digits", given)
            tally["read"] += 1
            continue
        tally["refused"] += 1


@pytest.mark.parametrize("override", [b"name=\xff", b"na\xffme=x"])
def test_bytes_that_are_no_text_are_refused_on_the_command_line(override: bytes) -> None:
    """A shell hands over any bytes; those that are not UTF-8 arrive as halves of surrogate pairs."""
    command = [sys.executable, "-m", "acdit.cli", "train", "digits", override]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("acdit: error: ")
    assert done.stderr.count("\n") == 1


# --- row 30: weights that do not fit ----------------------------------------------------------------------------------


@short_and_long(6, 600)
def test_all_weights_that_do_not_fit_are_listed_and_nothing_is_written(
    cases: int, tmp_path: Path, tally: Tally
) -> None:
    rng = random.Random(30)
    good = to_reference_state_dict(random_model())
    # What the sizes are read from is refused with a message of its own (tests/test_convert.py).
    sizing = (
        "x_embedder.weight",
        "y_embedder",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.q_norm",
        "blocks.0.mlp.fc1.w",
    )
    names = [name for name in good if not name.startswith(sizing)]
    spoilers: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda value: torch.cat([value, value]),
        lambda value: value[:-1].clone(),
        lambda value: value[None].clone(),
        lambda value: value.flatten()[:1].clone(),
    )
    for case in range(cases):
        state = dict(good)
        chosen = rng.sample(names, rng.randint(1, 8))
        words = []
        for name in chosen:
            kind = rng.randrange(3)
            if kind == 0 and name.startswith(("blocks.0", "final")):  # the number of layers is read from the names
                del state[name]
                words.append(f"missing {name}")
            elif kind == 1:
                extra = f"{name}.{rng.randrange(100)}" if rng.random() < 0.5 else f"extra_{rng.randrange(10**6)}"
                state[extra] = torch.zeros(rng.randint(1, 4))
                words.append(f"extra {extra!r}")
            else:
                value = rng.choice(spoilers)(state[name])
                if value.shape == good[name].shape:
                    continue
                state[name] = value
                words.append(f"{name} is {tuple(value.shape)}, not {tuple(good[name].shape)}")
        if not words:
            continue
        place = tmp_path / f"case-{case}"
        place.mkdir()
        checkpoint = save(place / "in.pt", state)
        with pytest.raises(DataError) as caught:
            convert_reference(checkpoint, place / "out")
        assert caught.value.exit_code == 3
        for part in (f"{len(set(words))} weights do not fit", *words):
            assert part in str(caught.value)
        assert [file.name for file in place.iterdir()] == ["in.pt"]
        checkpoint.unlink()
        tally[f"{len(words)} listed"] += 1
