"""Storage: whatever happens in between, a name holds the old content or the whole new one."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acdit import storage
from acdit.errors import StorageError
from acdit.training.history import committed_checkpoints, prune


def commit(path: Path, content: bytes = b"weights" * 50) -> Path:
    with storage.atomic_directory(path) as directory:
        (directory / "sub").mkdir()
        (directory / "model.bin").write_bytes(content)
        (directory / "sub" / "state.json").write_text("{}")
    return path


def test_a_commit_verifies_and_replaces(tmp_path: Path) -> None:
    path = commit(tmp_path / "checkpoint-1", b"old")
    commit(path, b"new")
    assert set(storage.verify(path).files) == {"model.bin", "sub/state.json"}
    assert (path / "model.bin").read_bytes() == b"new"
    assert [place.name for place in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_inside_leaves_what_was_there(tmp_path: Path) -> None:
    path = commit(tmp_path / "checkpoint-1", b"old")
    with contextlib.suppress(ZeroDivisionError), storage.atomic_directory(path) as directory:
        (directory / "model.bin").write_bytes(b"half")
        raise ZeroDivisionError
    assert (path / "model.bin").read_bytes() == b"old"
    assert [place.name for place in tmp_path.iterdir()] == ["checkpoint-1"]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_and_every_cut_is_found_and_named(tmp_path: Path, data: st.DataObject) -> None:
    path = commit(tmp_path / f"checkpoint-{data.draw(st.integers(1, 10**9))}")
    file = path / data.draw(st.sampled_from(["model.bin", "sub/state.json", "manifest.json"]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    with pytest.raises(StorageError, match=file.name):
        storage.verify(path)


def killed_at_every_step(action: Callable[[], object], check: Callable[[], None]) -> int:
    """Run `action` in children, the k-th killed at its k-th durable step; how many steps there are."""
    for step in range(100):
        child = os.fork()
        if child == 0:
            left = step

            def die(_: str) -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            storage._step = die
            try:
                action()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        check()
        if not os.WIFSIGNALED(status):
            return step
    raise AssertionError("the action never ends")


def test_a_save_killed_at_any_step_is_there_wholly_or_not_at_all(tmp_path: Path) -> None:
    commit(tmp_path / "checkpoint-1", b"old")
    published = commit(tmp_path / "model", b"old")

    def save() -> None:
        commit(tmp_path / "checkpoint-2", b"new")
        commit(published, b"new")

    def check() -> None:
        for _, path in committed_checkpoints(tmp_path):
            storage.verify(path)
        storage.clean_leftovers(tmp_path)
        storage.verify(tmp_path / "checkpoint-1")
        storage.verify(published)
        assert (published / "model.bin").read_bytes() in (b"old", b"new")
        assert not list(tmp_path.glob(".tmp-*"))

    assert killed_at_every_step(save, check) >= 10
    assert (published / "model.bin").read_bytes() == b"new"


def test_a_text_killed_at_any_step_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("old")

    def check() -> None:
        assert log.read_text() in ("old", "new")
        storage.clean_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [log]

    assert killed_at_every_step(lambda: storage.write_text_atomic(log, "new"), check) == 2
    assert log.read_text() == "new"


def test_a_prune_killed_at_any_step_leaves_whole_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 6):
        commit(tmp_path / f"checkpoint-{step}")

    def check() -> None:
        checkpoints = committed_checkpoints(tmp_path)
        assert [step for step, _ in checkpoints][-2:] == [4, 5]
        for _, path in checkpoints:
            storage.verify(path)

    assert killed_at_every_step(lambda: prune(tmp_path, 2), check) >= 2
    storage.clean_leftovers(tmp_path)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_pruning_counts_only_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / "model.bin").write_bytes(b"damaged")
    prune(tmp_path, 2)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_full_disk_names_the_bytes_and_keeps_the_old(tmp_path: Path) -> None:
    path = commit(tmp_path / "checkpoint-1", b"old")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            commit(path, b"x" * 100_000)
        except StorageError as error:
            code = 0 if "bytes" in str(error) and error.exit_code == 5 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (path / "model.bin").read_bytes() == b"old"
    assert [place.name for place in tmp_path.iterdir()] == ["checkpoint-1"]


def test_figures_have_no_nan_and_no_infinity_and_settings_keep_them(tmp_path: Path) -> None:
    storage.write_json_atomic(tmp_path / "b.json", {"low": float("-inf")})
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"low": float("-inf")}
    storage.write_figures(tmp_path / "a.json", {"x": [1.5, float("nan"), (float("-inf"), "y")], "n": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"x": [1.5, None, [None, "y"]], "n": None}
    assert "NaN" not in text


def test_leftovers_are_not_checkpoints_and_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-checkpoint-7-123-deadbeef").mkdir()
    (tmp_path / "checkpoint-9").mkdir()  # no manifest: never committed
    assert committed_checkpoints(tmp_path) == []
    (tmp_path / ".tmpRaUULZ").touch()  # safetensors' own, of a process that was killed while it saved
    (tmp_path / ".tmp.notes").touch()  # a stranger's
    storage.clean_leftovers(tmp_path)
    assert [place.name for place in tmp_path.glob(".tmp*")] == [".tmp.notes"]
    commit(tmp_path / "checkpoint-7")
    assert [step for step, _ in committed_checkpoints(tmp_path)] == [7]


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with storage.RunLock(tmp_path):
            os.write(write, b"x")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(StorageError, match=str(child)), storage.RunLock(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with storage.RunLock(tmp_path):
        pass
