"""`acdit study` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acdit.cli import main
from acdit.studies import running
from acdit.studies.catalog import SETTINGS, studies
from tests.studies.small import put_judges


def test_without_a_name_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(studies(SETTINGS["digits"]))
    assert "Figure 4" in lines[0]
    assert main(["study", "--on", "mnist"]) == 0
    assert "ar-length-video" not in capsys.readouterr().out


def test_a_study_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put_judges(tmp_path / "runs" / "study-runs")
    small = [
        "model.num_layers=1", "model.num_attention_heads=1", "train.steps=2", "optim.batch_size=4",
        "sampling.num_inference_steps=1",
    ]  # fmt: skip
    assert main(["study", "context", *small, "--seeds", "0", "1", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "clean context is better than noisy context" in said
    assert "4 of 4 runs" in said
    written = json.loads((tmp_path / "runs" / "study-context" / "context.json").read_text())
    assert written["claims"][0]["verdict"] in ("reproduces", "does not reproduce", "not resolved")
    assert [run["seed"] for run in written["arms"][0]["runs"]] == [0, 1]
    assert main(["study", "context", "--seeds", "0", "1", "--threads", "1", *small]) == 0  # overrides may stand behind
    assert "4 of 4 runs are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["contex"], "did you mean 'context'"),
        (["context", "--on", "imagenet"], "digits, mnist, cifar10"),
        (["ar-length-video", "--on", "mnist", "--data", "x"], "--on digits"),
        (["context", "--on", "mnist"], "--data"),
        (["context", "--data", "x"], "built in"),
        (["context", "--seeds", "1", "1"], "--seeds"),
        (["context", "corruption.context_noise=0.5"], "the study itself sets"),
        (["context", "seed=5"], "--seeds"),
        (["context", "optim.lrr=5"], "did you mean 'lr'"),
        (["optim.lr=5"], "without a study"),
        (["--seeds", "3"], "without a study"),
        (["all", "--output", "x"], "a folder of its own"),
    ],
)
def test_mistakes_are_one_clear_line_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_all_goes_through_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str, int, int]] = []

    def noting(study: object, setting: object, output: str, **options: object) -> dict[str, object]:
        asked.append((study.name, output, options["workers"], options["threads"]))  # type: ignore[attr-defined, arg-type]
        return {"claims": []}

    monkeypatch.setattr(running, "run_study", noting)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert main(["study", "all", "--workers", "2"]) == 0
    assert [name for name, *_ in asked] == list(studies(SETTINGS["digits"]))
    assert asked[0][1:] == ("runs/study-ar-length", 2, 1)
    assert main(["study", "context", "--on", "mnist", "--data", "x"]) == 0
    assert asked[-1] == ("context", "runs/study-context-mnist", 1, 2)


def test_without_matplotlib_it_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["study", "context"]) == 2
    assert "acdit study; found no matplotlib" in capsys.readouterr().err


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from acdit.cli import main; main(['study']); main(['study', 'nothing']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
