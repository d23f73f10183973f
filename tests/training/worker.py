"""One process of a test's launch: python -m tests.training.worker SCENARIO DIRECTORY. Imports once, runs many runs."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acdit.cli import main
from acdit.recipe import recipe_to_yaml
from acdit.training import checkpoints
from tests.training.runs import run, tiny_recipe

EXACT: dict[str, Any] = {
    "train__precision": "fp64", "train__steps": 4, "optim__batch_size": 8, "optim__accumulation": 2,
    "data__flip": True, "corruption__copies": 2, "train__log_every": 3,
}  # fmt: skip
FSDP2 = {**EXACT, "train__parallel": "fsdp2"}
BF16 = {**EXACT, "train__precision": "bf16", "train__log_every": 1, "train__checkpoint_every": 1}
LAYERS: dict[str, Any] = {
    "model": {"grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 2, "num_attention_heads": 1,
              "attention_head_dim": 8, "num_classes": 10},
}  # fmt: skip


def two(directory: Path) -> None:
    """Fresh runs under both, and saves that fail on one of the processes."""
    run(tiny_recipe(**EXACT), directory / "ddp-2")
    drawing = {"train__sample_every": 4, "sampling__num_inference_steps": 1}
    run(tiny_recipe(**FSDP2, **drawing), directory / "fsdp2-2")
    for mode in ("elementwise", "layers"):
        options = {**FSDP2, **LAYERS, "train__gradient_checkpointing": mode}
        run(tiny_recipe(**options), directory / f"fsdp2-2-{mode}")
    for parallel in ("ddp", "fsdp2"):
        run(tiny_recipe(**BF16, train__parallel=parallel), directory / f"bf16-{parallel}-2")
    for parallel, rank in (("ddp", 0), ("fsdp2", 0), ("fsdp2", 1)):
        full_disk(directory / f"full-{parallel}-{rank}", parallel, rank)


def full_disk(directory: Path, parallel: str, full: int) -> None:
    """The second checkpoint meets a full disk on one process; every process notes its exit code."""
    write: Callable[..., None] = checkpoints.write

    def no_room(tensors: Any, file: Path, first: bool = True) -> None:
        if int(os.environ["RANK"]) == full and "checkpoint-4" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(tensors, file, first)

    directory.mkdir(exist_ok=True)
    recipe = directory / f"recipe-{os.environ['RANK']}.yaml"
    recipe.write_text(recipe_to_yaml(tiny_recipe(**EXACT, train__parallel=parallel)))
    checkpoints.write = no_room
    code = main(["train", str(recipe), "--output", str(directory / "run")])
    checkpoints.write = write
    (directory / f"code-{os.environ['RANK']}").write_text(json.dumps(code))


def four(directory: Path) -> None:
    """Fresh runs under both, and runs that go on from step 2 of two processes."""
    run(tiny_recipe(**EXACT), directory / "ddp-4")
    run(tiny_recipe(**FSDP2), directory / "fsdp2-4")
    run(tiny_recipe(**FSDP2), directory / "fsdp2-2-to-4", resume="latest")
    run(tiny_recipe(**EXACT), directory / "fsdp2-2-to-ddp-4", resume="latest")
    run(tiny_recipe(**FSDP2), directory / "ddp-2-to-fsdp2-4", resume="latest")


if __name__ == "__main__":
    {"two": two, "four": four}[sys.argv[1]](Path(sys.argv[2]))
