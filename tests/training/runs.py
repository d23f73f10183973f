"""Tiny runs that the training tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from acdit.recipe import Recipe, recipe_from_dict
from acdit.training import Trainer


def tiny_recipe(**overrides: Any) -> Recipe:
    """A recipe that trains in a second; overrides are dotted keys with `__` for the dot."""
    data: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {
            "grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 1, "num_attention_heads": 1,
            "attention_head_dim": 8, "num_classes": 10,
        },
        "data": {"kind": "digits", "channels": 1},
        "optim": {"batch_size": 4, "lr": 3e-3},
        "ema": {"decays": [0.99, 0.9]},
        "train": {"steps": 6, "checkpoint_every": 2, "log_every": 2, "tensorboard": False, "keep_checkpoints": 100},
    }  # fmt: skip
    for key, value in overrides.items():
        group, _, name = key.partition("__")
        if name:
            data.setdefault(group, {})[name] = value
        else:
            data[group] = value
    return recipe_from_dict(data)


def run(recipe: Recipe, output: Path, **options: Any) -> Trainer:
    """Train to the end; the trainer with its final state."""
    trainer = Trainer(recipe, output, progress=False, **options)
    trainer.train()
    return trainer


def state_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything a run's future depends on: weights, averages, moments."""
    state = trainer.state
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for index in range(len(state.ema.decays)):
        tensors |= {f"ema{index}.{name}": value for name, value in state.ema.weights(index).items()}
    for name, parameter in state.model.named_parameters():
        tensors |= {f"moment.{name}.{slot}": value for slot, value in state.optimizer.state[parameter].items()}
    return tensors


def state_hash(trainer: Trainer) -> str:
    """sha256 over the bits of `state_tensors`, the step and the averages' counters."""
    digest = hashlib.sha256(f"{trainer.state.step} {trainer.state.ema.counters}".encode())
    for name, value in sorted(state_tensors(trainer).items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def largest_difference(one: Trainer, other: Trainer) -> float:
    """Largest relative difference of weights."""
    a, b = one.state.model.state_dict(), other.state.model.state_dict()
    return max(float((a[name] - b[name]).norm() / (b[name].norm() + 1e-12)) for name in a)
