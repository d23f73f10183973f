"""Rows 2, 4, 5, 6, 12 and 14 of the reliability bar at length: what may happen to checkpoints, and between them.

Every campaign has a short form of a few cases, which each run of the tests makes.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import storage
from acdit.cli import main
from acdit.errors import AcditError, NonFiniteError, StorageError
from acdit.recipe import flatten, recipe_from_dict, recipe_to_dict, recipe_to_yaml
from acdit.training import Trainer, checkpoints, loop
from acdit.training.history import committed_checkpoints
from acdit.training.reporting import Report
from tests import autoencoders
from tests.faults.campaigns import LONG, in_child, short_and_long
from tests.faults.conftest import Tally
from tests.faults.system_calls import kill_at_call, needs_ptrace
from tests.training.runs import run, state_hash, tiny_recipe


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not wait for threads that only their parent has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve takes longer than these runs."""
    monkeypatch.setattr(Report, "loss_curve", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "finished"
    run(tiny_recipe(), path)
    return path


# --- row 2: kill −9 at any system call of a save ------------------------------------------------------------------


@needs_ptrace
@pytest.mark.usefixtures("_no_pictures")
@short_and_long(4, 10**6)
def test_a_kill_at_any_system_call_of_a_save_leaves_whole_checkpoints(cases: int, tmp_path: Path, tally: Tally) -> None:
    """The save writes checkpoint-3, replaces model/ and prunes checkpoint-2."""
    place, before = tmp_path / "run", tmp_path / "before"
    trainer = run(tiny_recipe(train__steps=2, train__checkpoint_every=1, train__keep_checkpoints=1), place)
    old = storage.verify(place / "model")
    shutil.copytree(place, before)
    trainer.state.step = 3
    with torch.no_grad():
        for average in trainer.state.ema.weights(0).values():
            average.add_(1)

    def start_over() -> None:
        shutil.rmtree(place)
        shutil.copytree(before, place)

    start_over()
    killed, calls = kill_at_call(trainer._save, None)
    assert not killed
    new = storage.verify(place / "model")
    assert old.files != new.files
    assert {"open", "write", "fsync", "rename", "renameat2", "unlink", "mkdir"} <= {re.sub("at$", "", c) for c in calls}
    points = range(len(calls)) if cases > len(calls) else range(0, len(calls), max(1, len(calls) // cases))
    for point in points:
        start_over()
        killed, made = kill_at_call(trainer._save, point)
        assert killed
        held = committed_checkpoints(place)
        for _, path in held:
            storage.verify(path)
        assert {step for step, _ in held} & {2, 3}, f"no checkpoint after a kill at call {point}, after {made[-3:]}"
        assert checkpoints.find(place, "latest") == held[-1][1]
        published = storage.verify(place / "model")
        assert published.files in (old.files, new.files)
        tally[f"{' and '.join(str(step) for step, _ in held)} there, model {'old' if published == old else 'new'}"] += 1
        storage.clean_leftovers(place)
        assert not list(place.glob(".tmp-*"))
        shutil.rmtree(place / "checkpoint-3", ignore_errors=True)
        trainer._save()  # and saving works again
        assert [step for step, _ in committed_checkpoints(place)] == [3]
        assert storage.verify(place / "model").files == new.files


# --- row 4: the disk is full at any byte --------------------------------------------------------------------------

Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def inputs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: pictures, an autoencoder, a run and its model."""
    base = tmp_path_factory.mktemp("inputs")
    autoencoders.kl().save_pretrained(base / "vae")
    autoencoders.picture_folder(base / "pictures")
    shutil.copytree(finished, base / "run")
    constant = {"optim__schedule": "constant", "train__keep_checkpoints": 2}
    run(tiny_recipe(**constant), base / "constant")
    longer = {**constant, "train__sample_every": 4, "sampling__num_inference_steps": 1}
    for name, more in (("plain", {}), ("tensorboard", {"train__tensorboard": True})):
        (base / f"{name}.yaml").write_text(recipe_to_yaml(tiny_recipe(**longer, train__steps=8, **more)))
    return base


def _command(name: str, base: Path, output: Path) -> list[str]:
    model = str(base / "run" / "model")
    draw = [model, "--steps", "1", "--seed", "1", "--labels", "0", "1"]
    return {
        "train": ["train", str(base / "plain.yaml"), "--output", str(output), "--resume"],
        "train with tensorboard": ["train", str(base / "tensorboard.yaml"), "--output", str(output), "--resume"],
        "encode": ["encode", str(base / "pictures"), "--vae", str(base / "vae"), "--size", "16", "--flips",
                   "--shard-size", "3", "--device", "cpu", "--output", str(output)],
        "sample": ["sample", *draw, "--output", str(output)],
        "sample many": ["sample", *draw, "--num-samples", "7", "--chunk-size", "3", "--npz", str(output / "s.npz"),
                        "--png", "--output", str(output)],
        "evaluate": ["evaluate", *draw, "--reference", "digits:held_out", "--extractor", "pixels", "--num-samples",
                     "6", "--output", str(output / "metrics.json")],
        "consolidate": ["consolidate", str(base / "run" / "checkpoint-6"), str(output)],
    }[name]  # fmt: skip


COMMANDS = ("train", "train with tensorboard", "encode", "sample", "sample many", "evaluate", "consolidate")


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        pytest.param("sample many", 1, id="sample many-short"),
        *(pytest.param(name, 20, id=f"{name}-long", marks=LONG) for name in COMMANDS),
    ],
)
def test_a_disk_that_is_full_at_any_byte_ends_with_exit_5(
    name: str, cases: int, inputs: Path, tmp_path: Path, tally: Tally
) -> None:
    """The kernel refuses files beyond a random size, as a full disk would; afterwards the same command succeeds."""
    training = name.startswith("train")

    def start(output: Path) -> list[str]:
        if training:
            shutil.copytree(inputs / "constant", output)
        return _command(name, inputs, output)

    whole = start(tmp_path / "whole")
    code, said = in_child(lambda: main(whole))
    assert code == 0, said
    sizes = [file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    rng = random.Random(name)
    for case in range(cases):
        # Sizes in a logarithmic scale: most files are small. The largest file cannot be written at any of them.
        limit = 100 if cases == 1 else int(math.exp(rng.uniform(0, math.log(max(sizes))))) - 1
        output = tmp_path / f"full-{case}"
        arguments = start(output)
        kept = {path.name: storage.verify(path) for path in output.glob("checkpoint-6")}
        code, said = in_child(lambda arguments=arguments: main(arguments), largest_file=limit)  # type: ignore[misc]
        errors = [line for line in said.splitlines() if line.startswith("acdit: error:")]
        assert code == 5, f"limit {limit}: {code}\n{said}"
        assert "Traceback" not in said, said
        assert len(errors) == 1, said
        assert "no room" in errors[0], said
        tally["exit 5, a size named" if re.search(r"at least [\d,]+ bytes", errors[0]) else "exit 5"] += 1
        assert all(storage.verify(output / step) == manifest for step, manifest in kept.items())
        if training:
            storage.verify(output / "model")
        assert not [left for left in output.rglob(".tmp-*") if left.is_dir() and training]
        code, said = in_child(lambda arguments=arguments: main(arguments))  # type: ignore[misc]
        assert code == 0, f"after a full disk at {limit} bytes: {said}"
        _require_same(name, tmp_path / "whole", output)
        shutil.rmtree(output)


def _require_same(name: str, whole: Path, output: Path) -> None:
    """The second start made what an undisturbed one makes."""
    if name.startswith("train"):
        assert storage.verify(output / "model").files == storage.verify(whole / "model").files
        weights = [(place / "checkpoint-8" / "model.safetensors").read_bytes() for place in (whole, output)]
        assert weights[0] == weights[1]
        return
    volatile = ("settings.json", "metrics.json", ".lock", "work.json")  # times, commands, paths
    for file in whole.rglob("*"):
        if file.is_file() and file.name not in volatile and file.suffix not in (".npz",):
            assert (output / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


# --- rows 5 and 6: cuts and flipped bits --------------------------------------------------------------------------


@short_and_long(30, 6000)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damage_anywhere_is_named_and_the_previous_checkpoint_is_taken(
    damage: str, cases: int, finished: Path, tmp_path: Path, tally: Tally, caplog: pytest.LogCaptureFixture
) -> None:
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    files = sorted(file for file in (place / "checkpoint-6").rglob("*") if file.is_file())
    assert len(files) >= 7
    rng = random.Random(damage)
    for case in range(cases):
        file = files[case % len(files)]
        content = file.read_bytes()
        if damage == "cut":
            file.write_bytes(content[: rng.randrange(len(content))])
        else:
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert checkpoints.find(place, "latest").name == "checkpoint-4"
        assert "checkpoint-6 is damaged" in caplog.text
        assert file.name in caplog.text
        with pytest.raises(StorageError, match=re.escape(file.name)) as caught:
            checkpoints.find(place, "checkpoint-6")
        assert caught.value.exit_code == 5
        tally[file.name] += 1
        file.write_bytes(content)
    assert checkpoints.find(place, "latest").name == "checkpoint-6"


# --- row 12: every field of the recipe ----------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "name": "other", "seed": 4,
    "model.grid": [4, 16], "model.block": [2, 4], "model.patch": [2, 2], "model.in_channels": 3, "model.preset": "B",
    "model.num_layers": 2, "model.num_attention_heads": 2, "model.attention_head_dim": 16, "model.mlp_ratio": 2.0,
    "model.num_classes": 11, "model.rope": "1d", "model.rope_split": [2, 2], "model.rope_base": 10000.0,
    "model.window": 2, "model.sink_blocks": 1, "model.sink_positions": "sliding", "model.vocab_size": 9,
    "model.time_conditioning": False,
    "data.kind": "idx", "data.root": "x", "data.split": "held_out", "data.size": 8, "data.crop": "random",
    "data.channels": 3, "data.flip": True, "data.shift": 1, "data.classes": "x", "data.image_column": "x",
    "data.label_column": "x",
    "data.streaming": True, "data.shuffle_buffer": 9, "data.max_bad_files": 1, "data.num_workers": 1,
    "data.frames": 8, "data.frame_stride": 2, "data.fps": 4.0, "data.start": "first", "data.short_clips": "loop",
    "data.split_file": "x", "data.digits_per_clip": 2,
    "data.tokenizer": "x", "data.sequence_length": 8, "data.wrap": "bos", "data.document": "line",
    "data.text_column": "x", "data.held_out": 0.5, "data.subset": "x", "data.cache": "x",
    "codec.kind": "vae", "codec.mean": 0.4, "codec.std": 0.4, "codec.vae": "x", "codec.subfolder": "x",
    "codec.posterior": "sample", "codec.scaling_factor": 1.0, "codec.shift_factor": 1.0, "codec.vae_sha256": "0",
    "codec.tiling": True, "codec.slicing": True,
    "corruption.prediction_type": "v_prediction", "corruption.num_train_timesteps": 500,
    "corruption.beta_schedule": "scaled_linear", "corruption.beta_start": 2e-4, "corruption.beta_end": 0.03,
    "corruption.timestep_draw": "logit_normal", "corruption.logit_mean": 0.5, "corruption.logit_std": 2.0,
    "corruption.min_snr_gamma": 5.0, "corruption.copies": 2, "corruption.context_noise": 0.5,
    "corruption.self_context": 0.5, "corruption.self_context_steps": 3, "corruption.self_context_strength": 0.9,
    "corruption.kind": "masking", "corruption.mask_draw": "count", "corruption.mask_range": [0.2, 0.9],
    "corruption.first_token_given": True, "corruption.low_discrepancy": False, "corruption.range_search_every": 5,
    "optim.batch_size": 8, "optim.lr": 1e-3, "optim.betas": [0.9, 0.99], "optim.eps": 1e-6, "optim.weight_decay": 0.1,
    "optim.accumulation": 2, "optim.max_grad_norm": 2.0, "optim.schedule": "cosine", "optim.warmup_steps": 1,
    "optim.decay_fraction": 0.5, "optim.label_dropout": 0.2,
    "ema.decays": [0.99, 0.8], "ema.warmup": False, "ema.inv_gamma": 2.0, "ema.power": 0.5,
    "train.steps": 9, "train.epochs": 1, "train.precision": "bf16", "train.compile": True,
    "train.gradient_checkpointing": "layers", "train.parallel": "fsdp2", "train.init_from": "x",
    "train.timeout_seconds": 99,
    "train.checkpoint_every": 3, "train.keep_checkpoints": 2, "train.log_every": 1, "train.sample_every": 3,
    "train.tensorboard": True, "train.threads": 2,
    "sampling.num_inference_steps": 5, "sampling.guidance_scale": 2.0, "sampling.labels": [1],
    "classification": {"tune": "all"},
}  # fmt: skip
"""Another value of every field; most are allowed by the recipe, some do not fit the data and are refused by them."""


def _with(path: str) -> dict[str, Any]:
    changed = recipe_to_dict(tiny_recipe())
    group, _, name = path.rpartition(".")
    (changed[group] if group else changed)[name] = OTHER[path]
    if path == "train.epochs":
        changed["train"]["steps"] = None
    return changed


def _refusal(make: Callable[[], Any]) -> AcditError | None:
    try:
        make()
    except AcditError as error:
        return error
    finally:
        torch.set_num_threads(1)
    return None


@pytest.mark.usefixtures("_no_pictures")
@short_and_long(6, 10**6)
def test_a_resumed_run_with_another_value_of_any_field_is_refused_or_the_same_run(
    cases: int, finished: Path, tmp_path: Path, tally: Tally, caplog: pytest.LogCaptureFixture
) -> None:
    """What is accepted without a warning must be the run that this recipe makes from its start, to the bit."""
    fields = flatten(recipe_to_dict(tiny_recipe()))
    assert set(OTHER) == set(fields), "this table names every field of a recipe"
    assert all(OTHER[path] != value for path, value in fields.items())
    paths = random.Random(1).sample(sorted(OTHER), min(cases, len(OTHER)))
    for number, path in enumerate(paths):
        place = Path(shutil.copytree(finished, tmp_path / f"run-{number}"))
        caplog.clear()
        made: list[Any] = []

        def resume(path: str = path, place: Path = place, made: list[Any] = made) -> None:
            made.append(recipe_from_dict(_with(path)))
            made.append(Trainer(made[0], place, resume="checkpoint-4", progress=False))

        with caplog.at_level(logging.WARNING):
            refused = _refusal(resume)
        if refused is not None:
            # A field that decides about others (another kind of data, an autoencoder) may be refused by one of these.
            assert path in str(refused) or f"{path.partition('.')[0]}." in str(refused), f"{path}: {refused}"
            assert refused.exit_code in (2, 3)
            tally["refused"] += 1
            continue
        recipe, trainer = made
        if f"not bit-exact: {path} differs" in caplog.text:
            tally["accepted, warned as not bit-exact"] += 1
            continue
        trainer.train()
        torch.set_num_threads(1)
        fresh = run(recipe, tmp_path / f"fresh-{number}")
        assert state_hash(trainer) == state_hash(fresh), f"{path} changes the run, and was accepted"
        tally["accepted, the same run to the bit"] += 1


# --- row 14: NaN and infinity -------------------------------------------------------------------------------------


def _poisonings() -> list[tuple[str, int, float]]:
    names = [name for name, _ in Trainer(tiny_recipe(), "nowhere").state.model.named_parameters()]
    rng = random.Random(14)
    values = (float("nan"), float("inf"), float("-inf"))
    gradients = [(name, rng.randrange(6), value) for name in names for value in values]
    losses = [("loss", step, value) for step in range(6) for value in values]
    return rng.sample([*gradients, *losses], len(gradients) + len(losses))


class Poison:
    """One value of a loss or of a parameter's gradient, in the second micro-batch of a step."""

    def __init__(self, trainer: Trainer, name: str, step: int, value: float) -> None:
        self.name, self.step, self.value = name, step, value
        self.before: dict[str, torch.Tensor] = {}
        """The weights when the step began."""
        self._trainer, self._micro_batch, self._loss = trainer, 0, loop.Trainer._loss
        if name != "loss":
            dict(trainer.state.model.named_parameters())[name].register_hook(self.gradient)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        loss = self._loss(self._trainer, model, batch)
        if self._trainer.state.step != self.step:
            return loss
        self._micro_batch += 1
        if self._micro_batch == 1:
            self.before = {key: tensor.clone() for key, tensor in self._trainer.state.model.state_dict().items()}
        return loss * self.value if self.name == "loss" and self._micro_batch == 2 else loss

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self._trainer.state.step != self.step or self._micro_batch != 2:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[self.step % gradient.numel()] = self.value
        return spoiled


@pytest.mark.usefixtures("_no_pictures")
@short_and_long(2, 10**6)
def test_one_bad_value_in_a_loss_or_in_any_gradient_at_any_step_stops_before_the_update(
    cases: int, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state_hash(run(tiny_recipe(optim__accumulation=2), tmp_path / "whole"))
    for number, (name, step, value) in enumerate(_poisonings()[:cases]):
        limit = {"optim__max_grad_norm": None} if number % 2 else {}
        place = tmp_path / f"run-{number}"
        trainer = Trainer(tiny_recipe(optim__accumulation=2, **limit), place, progress=False)
        poison = Poison(trainer, name, step, value)
        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_loss", poison.loss)
            with pytest.raises(NonFiniteError, match=f"step {step + 1};") as caught:
                trainer.train()
        assert caught.value.exit_code == 4
        assert all(torch.equal(tensor, poison.before[key]) for key, tensor in trainer.state.model.state_dict().items())
        saved = [step for step, _ in committed_checkpoints(place)]
        assert saved == [done for done in (2, 4, 6) if done <= step]
        assert (place / "model").is_dir() == bool(saved)
        logged = (place / "log.jsonl").read_text().splitlines() if (place / "log.jsonl").exists() else []
        assert all(math.isfinite(json.loads(line)["loss"]) for line in logged)
        tally["a loss" if name == "loss" else "a gradient"] += 1
        if saved and not limit:  # once the cause is gone, the run goes on as if nothing had been
            recipe = tiny_recipe(optim__accumulation=2)
            assert state_hash(run(recipe, place, resume="latest")) == expected
            tally.figures["resumed to the bit"] = tally.figures.get("resumed to the bit", 0) + 1
        shutil.rmtree(place)
