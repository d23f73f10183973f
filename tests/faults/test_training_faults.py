"""The training rows of the reliability bar: what goes wrong, and what the user is told."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acdit import storage
from acdit.cli import main
from acdit.errors import ConfigError, DataError, NonFiniteError, StorageError
from acdit.recipe import recipe_to_yaml
from acdit.training import Trainer, loop
from acdit.training.ema import EMAWeights
from acdit.training.history import committed_checkpoints
from acdit.training.reporting import Report
from tests.training.runs import run, state_hash, tiny_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    run(tiny_recipe(), path)
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def recommit(checkpoint: Path) -> None:
    """Rewrite the manifest after a deliberate change: the fault to be found lies deeper than the checksum."""
    copy = checkpoint.with_name("copy")
    checkpoint.rename(copy)
    (copy / "manifest.json").unlink()
    with storage.atomic_directory(checkpoint) as directory:
        shutil.copytree(copy, directory, dirs_exist_ok=True)
    shutil.rmtree(copy)


# --- rows 5 and 6: damaged checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    copied: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = copied / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-20] ^= 4
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        resumed = run(tiny_recipe(), copied, resume="latest")
    assert "checkpoint-6 is damaged" in caplog.text
    assert "optimizer.safetensors" in caplog.text
    assert resumed.state.step == 6
    assert storage.verify(copied / "checkpoint-6")


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(copied: Path) -> None:
    file = copied / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"checkpoint-4.model\.safetensors"):
        Trainer(tiny_recipe(), copied, resume="checkpoint-4")


def test_the_resumed_run_after_damage_ends_where_the_undamaged_one_does(finished: Path, copied: Path) -> None:
    expected = state_hash(Trainer(tiny_recipe(), finished, resume="checkpoint-6", progress=False))
    for step in (4, 6):
        file = copied / f"checkpoint-{step}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    assert state_hash(run(tiny_recipe(), copied, resume="latest")) == expected


# --- rows 8 and 11: missing state --------------------------------------------------------------------------------

MISSING = {
    "model.safetensors": "model",
    "ema-1.safetensors": "ema-1",
    "optimizer.safetensors": "optimizer",
    "rng.safetensors": "generator states",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_refused_by_name(copied: Path, name: str) -> None:
    (copied / "checkpoint-6" / name).unlink()
    with pytest.raises(StorageError, match=name):  # the manifest notices
        Trainer(tiny_recipe(), copied, resume="checkpoint-6")
    recommit(copied / "checkpoint-6")
    with pytest.raises(StorageError, match=MISSING[name]):  # and so does the reader, without the manifest's help
        Trainer(tiny_recipe(), copied, resume="checkpoint-6")


def test_generator_states_may_be_given_up_on_request(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a user meets it: the file is gone and the manifest still lists it."""
    (copied / "checkpoint-6" / "rng.safetensors").unlink()
    for wanted in ("checkpoint-6", "latest"):
        with caplog.at_level(logging.WARNING):
            trainer = Trainer(tiny_recipe(), copied, resume=wanted, allow_inexact=True)
        assert trainer.state.step == 6
        assert "not bit-exact: the checkpoint has no generator states" in caplog.text
        caplog.clear()
    (copied / "checkpoint-6" / "ema-0.safetensors").unlink()  # nothing else may be missing
    with pytest.raises(StorageError, match=r"ema-0\.safetensors"):
        Trainer(tiny_recipe(), copied, resume="checkpoint-6", allow_inexact=True)


@pytest.mark.parametrize("key", ["lr_scheduler", "ema", "sampler", "step", "recipe"])
def test_a_missing_part_of_the_state_is_named(copied: Path, key: str) -> None:
    file = copied / "checkpoint-6" / "state.json"
    state = json.loads(file.read_text())
    del state[key]
    file.write_text(json.dumps(state))
    recommit(copied / "checkpoint-6")
    with pytest.raises(StorageError, match=key):
        Trainer(tiny_recipe(), copied, resume="checkpoint-6")


def test_a_missing_tensor_is_named_and_nothing_is_changed(copied: Path) -> None:
    file = copied / "checkpoint-6" / "optimizer.safetensors"
    tensors = load_file(file)
    del tensors["final_layer.linear.weight.exp_avg"]
    save_file(tensors, file)
    recommit(copied / "checkpoint-6")
    with pytest.raises(StorageError, match=r"final_layer\.linear\.weight\.exp_avg"):
        Trainer(tiny_recipe(), copied, resume="checkpoint-6")


# --- rows 10, 12, 13, 18: other conditions, other recipes, other runs -----------------------------------------------


def test_other_conditions_are_warned_about(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copied / "checkpoint-6" / "state.json"
    state = json.loads(file.read_text())
    state["environment"] |= {"torch": "1.0", "threads": 99}
    file.write_text(json.dumps(state))
    recommit(copied / "checkpoint-6")
    with caplog.at_level(logging.WARNING):
        Trainer(tiny_recipe(train__precision="bf16"), copied, resume="latest")
    for name in ("torch", "threads", "train.precision"):
        assert any("not bit-exact" in message and name in message for message in caplog.messages), name


UNSAFE = {
    "seed": 4, "optim__lr": 1e-3, "optim__batch_size": 8, "optim__label_dropout": 0.2, "optim__betas": [0.9, 0.99],
    "corruption__copies": 2, "corruption__prediction_type": "v_prediction", "ema__decays": [0.99, 0.8],
    "data__flip": True, "codec__mean": 0.4, "optim__max_grad_norm": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("key", UNSAFE)
def test_a_recipe_that_would_be_another_run_is_refused(copied: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
        Trainer(tiny_recipe(**{key: UNSAFE[key]}), copied, resume="latest")


def test_all_differing_fields_are_listed_together(copied: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer(tiny_recipe(seed=9, optim__lr=1e-3, data__flip=True), copied, resume="latest")
    for path in ("seed: 3", "optim.lr: 0.003", "data.flip: False"):
        assert path in str(error.value)


def test_a_run_may_be_extended_while_the_steps_done_stay_the_same(copied: Path) -> None:
    decaying, constant = {"optim__decay_fraction": 0.5}, {"optim__schedule": "constant"}
    shutil.rmtree(copied)
    run(tiny_recipe(**decaying), copied)
    with pytest.raises(ConfigError, match=r"train\.steps"):  # WSD's decay had begun: another history
        Trainer(tiny_recipe(**decaying, train__steps=12), copied, resume="latest")
    other = copied.with_name("constant")
    run(tiny_recipe(**constant), other)
    longer = run(tiny_recipe(**constant, train__steps=8), other, resume="latest")
    assert longer.state.step == 8


def test_a_checkpoint_that_is_not_there_is_never_a_fresh_start(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(StorageError, match="no checkpoint"):
        Trainer(tiny_recipe(), tmp_path / "nothing", resume="latest")
    with pytest.raises(StorageError, match="checkpoint-4"):
        Trainer(tiny_recipe(), copied, resume="checkpoint-999")
    with pytest.raises(StorageError, match="checkpoint-9"):
        Trainer(tiny_recipe(), tmp_path / "new", branch_from=copied / "checkpoint-9")


def test_going_on_from_an_older_checkpoint_never_loses_the_new_work(tmp_path: Path) -> None:
    """Later checkpoints of the abandoned history neither push the new ones out nor are resumed from."""
    options = {"optim__schedule": "constant", "train__keep_checkpoints": 3}
    run(tiny_recipe(**options), tmp_path)
    recipe = tiny_recipe(**{**options, "train__keep_checkpoints": 1, "train__steps": 5})
    resumed = run(recipe, tmp_path, resume="checkpoint-2")
    assert [step for step, _ in committed_checkpoints(tmp_path)] == [5]
    aside = sorted(path.name.split("-")[2] for path in tmp_path.glob("abandoned-checkpoint-*"))
    assert aside == ["4", "6"]
    again = Trainer(recipe, tmp_path, resume="latest", progress=False)
    assert again.state.step == 5
    assert state_hash(again) == state_hash(resumed)


def test_a_checkpoint_without_its_marker_is_warned_about_and_does_not_stop_the_run_later(
    finished: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "checkpoint-6" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        resumed = run(tiny_recipe(), copied, resume="latest")
    assert "checkpoint-6 has no manifest.json" in caplog.text
    storage.verify(copied / "checkpoint-6")
    assert state_hash(resumed) == state_hash(Trainer(tiny_recipe(), finished, resume="latest", progress=False))


IMPOSSIBLE = {
    "labels of an unconditional model": ({"model__num_classes": None, "sampling__labels": [0]}, "sampling.labels"),
    "a label too high": ({"sampling__labels": [10]}, "sampling.labels"),
    "more steps than trained": (
        {"corruption__num_train_timesteps": 20, "sampling__num_inference_steps": 25}, "num_inference_steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sampling_settings_are_looked_at_before_the_first_step(name: str, tmp_path: Path) -> None:
    options, part = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=part):
        Trainer(tiny_recipe(**options), tmp_path)


def test_a_picture_that_fails_costs_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "samples", broken)
    with pytest.raises(OSError, match="No space"):
        run(tiny_recipe(train__sample_every=2), tmp_path)
    assert [step for step, _ in committed_checkpoints(tmp_path)] == [2]


def test_a_new_run_does_not_overwrite_an_old_one(copied: Path) -> None:
    with pytest.raises(StorageError, match="--resume"):
        Trainer(tiny_recipe(), copied)


def test_two_runs_in_one_directory_are_refused(copied: Path) -> None:
    with storage.RunLock(copied), pytest.raises(StorageError, match="one run a directory"):
        Trainer(tiny_recipe(), copied, resume="latest", progress=False).train()


# --- row 4: no room ----------------------------------------------------------------------------------------------


def test_no_room_for_a_checkpoint_names_the_bytes_it_needs(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = storage.verify(copied / "checkpoint-6").total_bytes
    trainer = Trainer(tiny_recipe(), copied, resume="checkpoint-4", progress=False)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match="1,000 bytes") as error:
        trainer.train()
    needed = max(
        int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", str(error.value).partition("found")[2])
    )
    assert 0.9 * size <= needed <= 1.1 * size
    assert error.value.exit_code == 5
    assert not list(copied.glob(".tmp-*"))
    assert storage.verify(copied / "checkpoint-4")


# --- row 14: NaN and Inf -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_not_taken_and_nothing_is_published(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_recipe(train__steps=6, train__checkpoint_every=3), tmp_path, progress=False)
    step, before = loop.Trainer._loss, {}

    def poisoned(self: Trainer, model: torch.nn.Module, batch: object) -> torch.Tensor:
        loss = step(self, model, batch)
        if self.state.step == 4:
            before.update({name: value.clone() for name, value in self.state.model.state_dict().items()})
            if where == "loss":
                return loss * float("nan")
            weight = self.state.model.x_embedder.weight
            return loss + (weight * 0).sum().sqrt()  # finite, with an infinite gradient
        return loss

    monkeypatch.setattr(loop.Trainer, "_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 5") as error:
        trainer.train()
    assert error.value.exit_code == 4
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.model.state_dict().items())
    assert [step for step, _ in committed_checkpoints(tmp_path)] == [3]
    assert json.loads((tmp_path / "checkpoint-3" / "state.json").read_text())["step"] == 3


# --- rows 20, 21, 25: data and layout against each other ----------------------------------------------------------


def test_class_counts_are_compared_before_the_first_step(tmp_path: Path) -> None:
    model = {
        "grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 1, "num_attention_heads": 1,
        "attention_head_dim": 8,
    }  # fmt: skip
    with pytest.raises(DataError, match="11, and 10 classes"):
        Trainer(tiny_recipe(model={**model, "num_classes": 11}), tmp_path)
    with pytest.raises(ConfigError, match=r"\[1, 2, 4, 8\]"):
        Trainer(tiny_recipe(model={**model, "block": [3, 4], "num_classes": 10}), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.grid"):
        Trainer(tiny_recipe(model={**model, "grid": [16, 16], "num_classes": 10}), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.in_channels"):
        Trainer(tiny_recipe(model={**model, "in_channels": 3, "num_classes": 10}), tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.labels"):
        Trainer(tiny_recipe(model={**model, "num_classes": 10}, sampling__labels=[10]), tmp_path)


def test_a_label_out_of_range_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building = importlib.import_module("acdit.training.build")
    dataset = building.build_dataset(tiny_recipe().data)
    dataset.labels[17] = 10  # type: ignore[attr-defined]
    monkeypatch.setattr(building, "build_dataset", lambda *_: dataset)
    with pytest.raises(DataError, match="sample 17"):
        Trainer(tiny_recipe(), tmp_path)


def test_a_kill_while_the_log_is_trimmed_loses_no_record(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming drops records from after the checkpoint: in place, a kill amid that emptied the log."""
    log = copied / "log.jsonl"
    kept = log.read_text()
    log.write_text(kept + '{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    before = log.read_text()

    class KilledError(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise KilledError

    for name in ("write_text", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, kill)
            with pytest.raises(KilledError):
                Report(copied, tiny_recipe(), 6, 6, active=True, progress=False)
        assert log.read_text() == before
    Report(copied, tiny_recipe(), 6, 6, active=True, progress=False).close()
    assert log.read_text() == kept


def test_a_run_ends_well_without_its_loss_curve(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a lost log nor a missing matplotlib is a reason to end in an error after the last step."""
    (copied / "log.jsonl").write_text("")
    Trainer(tiny_recipe(), copied, resume="latest", progress=False).train()
    assert "no loss curve" in caplog.text
    assert "no line with a step and a loss" in caplog.text
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Trainer(tiny_recipe(train__steps=8), copied, resume="latest", progress=False).train()
    assert "acdit[train]" in caplog.text


# --- rows 3 and 19, and the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_and_saves(number: int, code: int, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__steps=100_000, train__checkpoint_every=100_000, train__log_every=1)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    command = [
        sys.executable,
        "-m",
        "acdit.cli",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--output",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    ((step, path),) = committed_checkpoints(tmp_path / "run")
    storage.verify(path)
    assert step >= 3
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step


def test_out_of_memory_suggests_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 99 GB")

    monkeypatch.setattr(EMAWeights, "__init__", no_memory)
    assert main(["train", "digits", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    for word in ("batch_size", "accumulation", "gradient_checkpointing"):
        assert word in message
    assert "Traceback" not in message
