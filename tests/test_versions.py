"""The versions that are written down agree: pyproject.toml's bounds, the tested pins, the lowest ones, CI's rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TOOLS = "dev"
"""The extra for work on the package itself: its lower bounds are not promised to users, so nothing pins them."""


def requirements(*, tools: bool) -> dict[str, Requirement]:
    """Name to requirement, of the core and all extras; the extra that repeats others is left out."""
    lines = list(PROJECT["dependencies"])
    for extra, more in PROJECT["optional-dependencies"].items():
        if tools or extra != TOOLS:
            lines += more
    found = {canonicalize_name(each.name): each for each in map(Requirement, lines)}
    found.pop(canonicalize_name(PROJECT["name"]), None)
    return found


def pins(file: str, python: str) -> dict[str, Version]:
    """Name to version, of the lines whose marker holds on Linux with that Python. AssertionError: two lines hold."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "os_name": "posix",
        "platform_machine": "x86_64", "platform_system": "Linux", "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }  # fmt: skip
    found: dict[str, Version] = {}
    for line in (ROOT / file).read_text("utf-8").splitlines():
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        (one,) = pin.specifier
        assert one.operator == "==", line
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in found, f"two pins of {name} hold on Python {python}"
            found[name] = Version(one.version)
    return found


def lower_bound(requirement: Requirement) -> Version:
    (version,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return Version(version)


def test_the_lowest_constraints_are_the_lower_bounds() -> None:
    bounds = {name: lower_bound(each) for name, each in requirements(tools=False).items()}
    for python in PYTHONS:
        assert pins("constraints-lowest.txt", python) == bounds


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_tested_pin_within_its_bounds(python: str) -> None:
    pinned = pins("constraints.txt", python)
    for name, requirement in requirements(tools=True).items():
        assert name in pinned, f"constraints.txt has no pin of {name} on Python {python}"
        assert pinned[name] in requirement.specifier


def test_ci_tries_every_python_and_both_ends() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    assert tuple(jobs["test"]["strategy"]["matrix"]["python-version"]) == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    commands = [step.get("run", "") for step in jobs["versions"]["steps"]]
    assert any("make ${{ matrix.target }}" in command for command in commands)
    assert jobs["versions"]["strategy"]["matrix"]["target"] == ["test-lowest", "test-newest"]
