"""Checkpoints: safetensors and JSON in a directory that is there wholly or not at all.

checkpoint-N/  model.safetensors      the raw weights
               ema-0.safetensors …    one file a decay
               optimizer.safetensors  AdamW's moments by parameter name
               rng.safetensors        torch's generator states (training's own draws need none)
               state.json             step, recipe, schedule, counters, versions
               manifest.json          sha256 of every file; written last

Under FSDP2 every process writes its rows: model-00001-of-00002.safetensors and so on (`acdit.training.shards`). Either
form is read at any number of processes, under DDP and FSDP2.
"""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from acdit import storage
from acdit.errors import ConfigError, StorageError
from acdit.recipe import Recipe, difference, recipe_from_dict, recipe_to_dict
from acdit.training import history
from acdit.training.build import Built
from acdit.training.ema import EMAWeights
from acdit.training.lr_schedules import lr_factor
from acdit.training.parallel import Parallel
from acdit.training.shards import Part, atomic_directory, file_name, write

logger = logging.getLogger(__name__)

FORMAT = 1
RNG_FILE = "rng.safetensors"
_HEADER_BYTES = 128  # of a tensor's entry in its file: name, type, shape, place
# Fields that may differ between a checkpoint and the run that goes on from it: they change no number, or only what is
# still to come. train.steps, train.epochs and the schedule are looked at separately.
HARMLESS = (
    "name", "data.root", "data.num_workers", "data.max_bad_files", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_every", "train.sample_every", "train.tensorboard", "train.timeout_seconds",
    "sampling.num_inference_steps", "sampling.guidance_scale", "sampling.labels", "codec.vae", "codec.subfolder",
    "codec.vae_sha256",
)  # fmt: skip
INEXACT = ("train.threads", "train.compile", "train.gradient_checkpointing", "train.precision", "train.parallel")
SCHEDULE = ("train.steps", "train.epochs", "optim.schedule", "optim.decay_fraction", "optim.warmup_steps", "optim.lr")
BRANCHABLE = (*SCHEDULE, "optim.max_grad_norm", "optim.weight_decay")


@dataclass
class RunState:
    """The moving parts of a run: what a checkpoint holds and restores."""

    model: nn.Module
    ema: EMAWeights
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    step: int = 0
    """Optimizer steps done; also the index of the next one, hence the place in the data order."""
    loss_sum: float = 0.0
    loss_count: int = 0


def save(state: RunState, recipe: Recipe, run: Path, built: Built, parallel: Parallel, place: dict[str, Any]) -> Path:
    """Write checkpoint-N of a run, verify it, and prune old ones. Every process calls it.

    Under DDP the first process writes; under FSDP2 all write into one directory, which the first one commits.

    Args:
        state, recipe, run, built, parallel: of the run.
        place: how far the data are: "dataset_length", and "stream" where a stream has to go on from somewhere.

    Raises:
        StorageError: no room, or the files on disk are not what was written; older checkpoints are kept. In every
            process.
    """
    path = run / f"checkpoint-{state.step}"
    parts = _parts(state)
    shards = parallel.world_size if parallel.sharded else 1
    saved = [tensor for part in parts.values() for tensor in part.values()] + list(_rng_states().values())
    needed = sum(tensor.numel() * tensor.element_size() + shards * _HEADER_BYTES for tensor in saved)

    def fill(directory: Path) -> None:
        for part, tensors in parts.items():
            write(tensors, directory / file_name(part, parallel.rank, shards), first=parallel.main)
        if not parallel.main:
            return
        write(_rng_states(), directory / RNG_FILE)
        description = _describe(state, recipe, built, parallel.world_size, shards, place)
        (directory / "state.json").write_text(json.dumps(description, indent=2))

    def commit_alone() -> None:
        with storage.atomic_directory(path, expected_bytes=needed) as directory:
            fill(directory)

    def conclude() -> None:
        storage.verify(path)
        history.prune(run, recipe.train.keep_checkpoints)

    if parallel.sharded:
        with atomic_directory(parallel, path, needed) as directory:
            fill(directory)
    else:
        parallel.processes.by_first(commit_alone)
    parallel.processes.by_first(conclude)
    return path


def _describe(
    state: RunState, recipe: Recipe, built: Built, world_size: int, shards: int, place: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "shards": shards,
        "step": state.step,
        "sampler": {"next_step": state.step, **place},
        "lr_scheduler": {"last_epoch": state.lr_scheduler.last_epoch, "base_lrs": state.lr_scheduler.base_lrs},
        "ema": [
            {"decay": decay, "optimization_step": count}
            for decay, count in zip(state.ema.decays, state.ema.counters, strict=True)
        ],
        "loss_sum": state.loss_sum,
        "loss_count": state.loss_count,
        "environment": environment(world_size),
        "recipe": recipe_to_dict(recipe),
        "class_names": built.dataset.class_names,
        "mask_range": getattr(built.corruption, "mask_range", None),
        "tokenizer": getattr(built.tokenizer, "fingerprint", None),
    }


def environment(world_size: int) -> dict[str, Any]:
    """What bit-exactness depends on beside the recipe."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "processor": platform.machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def find(run: Path, wanted: str, *, allow_inexact: bool = False) -> Path:
    """The checkpoint to resume from.

    Args:
        run: the run's directory.
        wanted: "latest", a name ("checkpoint-300"), or a path.
        allow_inexact: a checkpoint without generator states will do.

    Returns:
        A checkpoint that verifies. "latest" falls back, with a warning, past checkpoints that do not; one asked for by
        name is the one or an error.

    Raises:
        StorageError: there is none, or the one asked for is damaged.
    """
    may_miss = (RNG_FILE,) if allow_inexact else ()
    if wanted != "latest":
        path = next((place for place in (run / wanted, Path(wanted)) if place.is_dir()), None)
        if path is None:
            held = [place.name for _, place in history.committed_checkpoints(run)]
            raise StorageError(
                f"checkpoint {wanted}", found="no such directory", expected=f"one of {held or 'none: the run has none'}"
            )
        storage.verify(path, may_miss)
        return path
    candidates = history.committed_checkpoints(run)
    for step, path in reversed(candidates):
        try:
            storage.verify(path, may_miss)
        except StorageError as error:
            logger.warning("%s is damaged and is passed over: %s", path.name, error)
            continue
        for later, other in history.all_checkpoints(run):
            if later > step and not storage.is_committed(other):
                logger.warning("%s has no %s and is passed over", other.name, storage.MANIFEST)
        return path
    damaged = f"{len(candidates)} checkpoints, none of them whole"
    raise StorageError(
        f"resume from {run}", found=damaged if candidates else "no checkpoint",
        expected="at least one", fix="start without --resume, in an empty directory",
    )  # fmt: skip


def read_description(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with every part that resuming needs.

    Raises:
        StorageError: a part is missing; its key is named.
    """
    file = path / "state.json"
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(str(file), found=str(error), expected="readable JSON") from None
    needed = ("format", "step", "sampler", "lr_scheduler", "ema", "loss_sum", "loss_count", "environment", "recipe")
    missing = [key for key in needed if key not in description]
    if missing:
        raise StorageError(f"{file}", found=f"no {', '.join(missing)}", expected="all state of the run")
    if description["format"] != FORMAT:
        raise StorageError(f"{file}: format", found=str(description["format"]), expected=str(FORMAT))
    return description


def require_same_run(
    description: dict[str, Any], recipe: Recipe, steps: int, old_steps: int, *, branch: bool, dataset_length: int | None
) -> list[str]:
    """Compare the checkpoint's recipe with this run's.

    Args:
        description: from `read_description`.
        recipe: of the run that goes on.
        steps, old_steps: its total steps, and the checkpoint's run's.
        branch: a new run that starts from the checkpoint may change the learning-rate schedule freely; a resumed one
            only where the steps already done would have been the same.
        dataset_length: samples in the data set at hand; None: a stream.

    Returns:
        Notes to log: what differs, and why the result is not bit-exact.

    Raises:
        ConfigError: fields differ that would make it another run; all are listed.
    """
    saved = recipe_from_dict(description["recipe"])
    step = description["step"]
    changed = difference(saved, recipe)
    allowed = {*HARMLESS, *INEXACT, *(BRANCHABLE if branch else ())}
    if not branch and all(
        lr_factor(saved.optim, old_steps, done) * saved.optim.lr
        == lr_factor(recipe.optim, steps, done) * recipe.optim.lr
        for done in range(step)
    ):
        allowed |= set(SCHEDULE)
    refused = {path: values for path, values in changed.items() if path not in allowed}
    if refused:
        listed = ", ".join(f"{path}: {old!r} in the checkpoint, {new!r} now" for path, (old, new) in refused.items())
        raise ConfigError(
            "the recipe is not the checkpoint's", found=listed, expected="the same values",
            fix="restore them, or start a new run (--from branches with another schedule)",
        )  # fmt: skip
    length = description["sampler"]["dataset_length"]
    if length != dataset_length:
        found, expected = (
            f"{count} samples" if count is not None else "a stream" for count in (dataset_length, length)
        )
        raise ConfigError("data", found=found, expected=f"{expected}, as in the checkpoint")
    notes = [f"{path} differs: {old!r} → {new!r}" for path, (old, new) in changed.items()]
    return notes + [f"not bit-exact: {path} differs" for path in changed if path in INEXACT]


def require_same_tokens(description: dict[str, Any], tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids mean something else than those of the checkpoint.

    Raises:
        ConfigError: another tokenizer.
    """
    now = getattr(tokenizer, "fingerprint", None)
    if description.get("tokenizer") != now:
        raise ConfigError(
            "data.tokenizer", found="another tokenizer than the checkpoint's", expected="the same tokens and rules",
            fix="restore the text or the tokenizer's files, or start a new run",
        )  # fmt: skip


def restore(
    state: RunState, path: Path, description: dict[str, Any], *, world_size: int, allow_inexact: bool
) -> list[str]:
    """Put a verified checkpoint into a run's objects, exactly to the bit.

    Returns:
        Warnings: why the run that goes on is not bit-exact.

    Raises:
        StorageError: a part is missing; it is named, and nothing was changed before all parts were there.
    """
    targets = _parts(state)
    if len(description["ema"]) != len(state.ema.decays):
        raise StorageError("ema", found=f"{len(description['ema'])} averages", expected=f"{len(state.ema.decays)}")
    sources = {part: Part(path, part, description.get("shards", 1)) for part in targets}
    warnings = []
    rng = path / RNG_FILE
    if not rng.is_file():
        if not allow_inexact:
            raise StorageError(
                f"{rng}", found="no such file", expected="torch's generator states",
                fix="add --allow-inexact to go on without them",
            )  # fmt: skip
        warnings.append("not bit-exact: the checkpoint has no generator states")
    for part, target in targets.items():
        sources[part].require({name: tuple(tensor.shape) for name, tensor in target.items()})
    with torch.no_grad():
        for part, target in targets.items():
            for name, tensor in target.items():
                sources[part].read_into(name, tensor)
    if rng.is_file():
        _restore_rng(load_file(rng))
    state.ema.counters = [entry["optimization_step"] for entry in description["ema"]]
    state.lr_scheduler.last_epoch = description["lr_scheduler"]["last_epoch"]
    factor = state.lr_scheduler.lr_lambdas[0](state.lr_scheduler.last_epoch)
    for group, base in zip(state.optimizer.param_groups, state.lr_scheduler.base_lrs, strict=True):
        group["lr"] = base * factor
    state.step = description["step"]
    state.loss_sum, state.loss_count = description["loss_sum"], description["loss_count"]
    now = environment(world_size)
    warnings += [
        f"not bit-exact: {key} was {description['environment'].get(key)!r}, is {value!r}"
        for key, value in now.items()
        if description["environment"].get(key) != value
    ]
    return warnings


def _parts(state: RunState) -> dict[str, dict[str, Tensor]]:
    """What makes up a checkpoint, a file a part; the tensors themselves, so that restoring writes into them."""
    averages = {f"ema-{index}": state.ema.weights(index) for index in range(len(state.ema.decays))}
    return {"model": state.model.state_dict(), **averages, "optimizer": _moments(state)}


def _moments(state: RunState) -> dict[str, Tensor]:
    """AdamW's state by parameter name: the tensors themselves. Made (as zeros) where no step has been taken yet."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            slots = state.optimizer.state[parameter]
            if not slots:
                # As AdamW itself would make them at its first step; fused keeps the count in fp32 beside the weights.
                fused = bool(group.get("fused"))
                slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
                slots["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                slots["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            moments |= {f"{names[id(parameter)]}.{slot}": tensor for slot, tensor in slots.items()}
    return moments


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda-{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    cuda = [states[name] for name in sorted(states) if name.startswith("cuda-")]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
