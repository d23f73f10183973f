"""`acdit export --push`, through the real huggingface_hub, to a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from acdit.cli import main
from acdit.errors import ConfigError, StorageError
from acdit.hub import push
from tests.hub.models import save
from tests.hub.server import Hub, served

REPO = "owner/digits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with served(hub) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like an export; its content plays no part in pushing."""
    (tmp_path / "export" / "transformer").mkdir(parents=True)
    names = ("README.md", "pipeline_acdit.py", "manifest.json", "transformer/diffusion_pytorch_model.safetensors")
    for name in names:
        (tmp_path / "export" / name).write_text(f"this is {name}\n")
    return tmp_path / "export"


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_is_exported_and_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save("image", tmp_path / "run")
    command = ["export", str(model), "--hub", str(tmp_path / "out"), "--push", REPO, "--private", "--samples", "1"]
    assert main([*command, "--steps", "2"]) == 0
    assert f"pushed: {hub.address}/{REPO}" in capsys.readouterr().out
    assert hub.repositories[REPO]["private"]
    assert hub.repositories[REPO]["files"] == content(tmp_path / "out")
    assert f'from_pretrained("{REPO}")' in (tmp_path / "out" / "README.md").read_text()
    assert "Bearer hf_of_a_test" in hub.tokens
    assert len(hub.commits) == 1


def test_an_earlier_export_is_replaced_and_other_files_stay(hub: Hub, folder: Path) -> None:
    assert push(folder, REPO) == f"{hub.address}/{REPO}"
    assert not hub.repositories[REPO]["private"]
    hub.repositories[REPO]["files"] |= {"classifier/config.json": b"{}", "notes.md": b"mine"}
    (folder / "README.md").write_text("new")
    push(folder, REPO)
    assert hub.repositories[REPO]["files"] == {**content(folder), "notes.md": b"mine"}


def test_an_empty_repository_is_taken(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = {"private": True, "files": {".gitattributes": b""}}
    push(folder, REPO, private=True)
    assert hub.repositories[REPO]["files"] == {**content(folder), ".gitattributes": b""}


def test_what_is_public_does_not_take_a_private_model(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="everybody can read"):
        push(folder, REPO, private=True)
    assert not hub.repositories[REPO]["files"]


def test_a_repository_with_something_else_is_left_alone(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = {"private": False, "files": {"config.json": b"{}", "README.md": b""}}
    with pytest.raises(ConfigError, match=r"something else in it \(README.md, config.json"):
        push(folder, REPO)
    assert not hub.commits


@pytest.mark.parametrize(
    ("path", "status", "error", "told"),
    [
        ("create", 401, ConfigError, "hf auth login"),
        ("create", 403, ConfigError, "no right to write there"),
        ("create", 500, StorageError, "the hub answers 500"),
        ("preupload", 403, ConfigError, "no right to write there"),
        ("commit", 413, StorageError, "is whole: the same command later"),
    ],
)
def test_refusals_are_one_clear_message(
    path: str, status: int, error: type[Exception], told: str, hub: Hub, folder: Path
) -> None:
    hub.refuse[path] = status
    with pytest.raises(error, match=told) as caught:
        push(folder, REPO)
    assert len(str(caught.value).splitlines()) == 1
    assert "hf_of_a_test" not in str(caught.value)
    assert not hub.commits


def test_somebody_elses_repository(hub: Hub, folder: Path) -> None:
    """It is there, and the token sees it, but may not write."""
    hub.repositories[REPO] = {"private": False, "files": {"pipeline_acdit.py": b""}}
    hub.refuse["preupload"] = 403
    with pytest.raises(ConfigError, match="no right to write there"):
        push(folder, REPO)


def test_no_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with served(Hub()) as address:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)  # nobody listens there any more
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with pytest.raises(StorageError, match="a hub that can be reached") as caught:
        push(folder, REPO)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "a/b/c", "owner/di gits", "owner/..x", ""])
def test_names_that_are_none(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--hub", str(tmp_path / "out"), "--push", name]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err


def test_without_a_token_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["export", str(tmp_path), "--hub", str(tmp_path / "out"), "--push", REPO]) == 2
    told = capsys.readouterr().err
    assert "HF_TOKEN" in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
