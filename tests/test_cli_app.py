"""acdit app on the command line; the page itself is tested in tests/app."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from acdit.cli import main


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    told = capsys.readouterr().err
    assert "pip install 'acdit[app]'" in told
    assert len(told.strip().splitlines()) == 1


def test_help_needs_neither_torch_nor_gradio() -> None:
    code = "import sys; from acdit.cli import main\ntry: main(['app', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'gradio', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_bad_ports_and_models(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    assert main(["app", "--port", "70000"]) == 2
    assert "65535" in capsys.readouterr().err
    assert main(["app", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err
