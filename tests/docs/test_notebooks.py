"""The notebooks run from top to bottom, and are kept without what they printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is in the extra dev")
nbclient = pytest.importorskip("nbclient", reason="nbclient is in the extra dev")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_A_CELL = 900


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["images", "text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_sound_and_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, f"{path.name}, {cell.id}", "exec")
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.mark.campaign
@pytest.mark.timeout(2 * SECONDS_A_CELL)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, pictures and all, as they stand."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS_A_CELL, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) >= (4 if path.stem == "images" else 1)
    assert not [output for output in shown if output.output_type == "error"]
