"""What is built and installed: every file that is used, an import that is quick and touches nothing, extras that say
how they are got."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "acdit"
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")
SLOWEST_IMPORT = 3.0
OWN_SHARE = 0.5
"""Processor seconds that our names may take beyond the libraries they stand on, which take most of it."""
EXTRAS = ("datasets", "matplotlib", "tensorboard", "av", "tokenizers", "gradio", "sklearn")
HEAVY = ("torch", "diffusers", *EXTRAS)

TOUCHES_NOTHING = f"""
import os, random, sys, threading, time
environment, threads, folder = dict(os.environ), threading.active_count(), sorted(os.listdir())
state = random.getstate()
import acdit
alone = time.process_time()  # of this process since its start: not what others on the machine take
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
libraries = time.process_time()
from acdit import ACDiTPipeline, ACDiTTextPipeline, ACDiTTransformer, BlockLayout, KVCache, sample_blocks
own = time.process_time() - libraries
extras = [name for name in {EXTRAS!r} if name in sys.modules]
assert not extras, extras
assert (environment, threads, folder) == (dict(os.environ), threading.active_count(), sorted(os.listdir()))
assert state == random.getstate()
print(acdit.__file__, alone, own)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=plain | environment, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), the wheel made from what the sdist holds: files that are missing there are missing in it."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    for name in NEEDED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    shutil.copytree(SOURCE, tree / "src" / "acdit", ignore=shutil.ignore_patterns("__pycache__"))
    made = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree, cwd=folder)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_every_file_of_the_package_is_in_both(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    files = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        metadata = next(name for name in in_wheel if name.endswith("METADATA"))
        described = archive.read(metadata).decode()
    assert {name for name in in_wheel if name.startswith("acdit/")} == files
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    assert "Blockwise autoregressive diffusion" in described
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"src/{name}" for name in files} <= in_sdist
    assert set(NEEDED) - {"constraints.txt"} <= in_sdist


def test_importing_what_was_installed_is_quick_and_touches_nothing(built: tuple[Path, Path], tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(site)
    times = []
    for _ in range(2):  # the second finds everything compiled
        done = run(sys.executable, "-c", TOUCHES_NOTHING, cwd=work, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
        where, alone, own = done.stdout.split()
        assert Path(where).is_relative_to(site)
        times.append((float(alone), float(own)))
    assert times[-1][0] <= SLOWEST_IMPORT, times
    assert times[-1][1] <= OWN_SHARE, times
    listed = run(sys.executable, "-m", "acdit.cli", "recipes", cwd=work, PYTHONPATH=str(site))
    assert listed.returncode == 0
    assert "digits" in listed.stdout


@pytest.mark.campaign
@pytest.mark.timeout(1500)
def test_an_empty_environment_takes_the_wheel_trains_and_draws(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Only the core: nothing of the extras, whose absence is told in one line."""
    environment = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", environment, cwd=tmp_path).returncode == 0
    python = environment / "bin" / "python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    for what in ("torch", built[0]):  # torch first and pinned: a bare request for it can pull CUDA
        done = run(python, "-m", "pip", "install", "--quiet", *constraints, what, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    acdit = environment / "bin" / "acdit"
    done = run(acdit, "train", "digits", "train.steps=3", "train.tensorboard=false", "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(acdit, "sample", "run/model", "--labels", "3", "--steps", "2", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out").glob("*.png"))
    refused = run(
        acdit, "train", "digits", "train.steps=3", "data.kind=hf", "data.root=x", "--output", "hf", cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "pip install 'acdit[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr
    imported = run(python, "-c", TOUCHES_NOTHING, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
