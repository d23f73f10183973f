"""docs/reliability.md names tests: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = {row[1]: row[0] for row in re.finditer(r"^\| (T?\d+) \|.*\|$", TEXT, re.M) if row[0].count("|") == 6}


def test_every_fault_has_a_row() -> None:
    assert set(ROWS) == {*map(str, range(1, 37)), *(f"T{row}" for row in range(1, 9))}


@pytest.mark.parametrize("row", sorted(ROWS))
def test_the_tests_that_a_row_names_are_there(row: int) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ROWS[row])
    assert named
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file}::{name}"
