"""Training from every kind of data: exact resumption, and the same samples whoever reads them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acdit import ACDiTPipeline
from acdit.data.stream_order import Row, _Endless
from acdit.errors import ConfigError, DataError
from acdit.recipe import Recipe
from acdit.training import build
from acdit.training.batches import Batches
from tests.data.pictures import png, write_tar
from tests.training.runs import run, state_hash, tiny_recipe
from tests.training.test_files import MODEL


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [png(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)) for _ in range(12)]


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, str]:
    """The same twelve pictures as shards, as a table, and as folders."""
    datasets = pytest.importorskip("datasets", reason="the library `datasets` is in the extra train")
    datasets.disable_progress_bars()
    for index, data in enumerate(pictures()):
        name = ("cat", "dog")[index % 2]
        (tmp_path / "folders" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / name / f"{index:02d}.png").write_bytes(data)
    members = {f"{i:02d}.{kind}": part for i, data in enumerate(pictures()) for kind, part in
               (("png", data), ("txt", (b"cat", b"dog")[i % 2]))}  # fmt: skip
    write_tar(tmp_path / "shards" / "s-0.tar", members)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": data, "path": None} for data in pictures()]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 6}, features=features)
    table.save_to_disk(tmp_path / "table", num_shards=2)
    return {"images": str(tmp_path / "folders"), "webdataset": str(tmp_path / "shards"), "hf": str(tmp_path / "table")}


def recipe_for(root: str, kind: str, **options: Any) -> Recipe:
    data = {"kind": kind, "root": root, "size": 8, "flip": True, **options.pop("data", {})}
    return tiny_recipe(**{"model": MODEL, "train__steps": 4, **options}, data=data)


STREAM = {"streaming": True, "shuffle_buffer": 5}
KINDS = [
    ("webdataset", {"crop": "random", "num_workers": 2}),
    ("hf", {"crop": "random"}),
    ("hf", STREAM),
    ("hf", {**STREAM, "crop": "random", "num_workers": 2}),
]


@pytest.mark.parametrize(("kind", "data"), KINDS)
def test_a_run_resumes_to_the_bit(roots: dict[str, str], tmp_path: Path, kind: str, data: dict[str, Any]) -> None:
    recipe = recipe_for(roots[kind], kind, data=data)
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    assert state_hash(run(recipe, tmp_path / "cut", resume="latest")) == state_hash(whole)
    pipeline = ACDiTPipeline.from_pretrained(tmp_path / "whole" / "model")
    assert pipeline.get_label_ids(["dog", "cat"]) == [1, 0]


def drawn(recipe: Recipe, world: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """What `world` processes together draw, step by step."""
    ranks = [iter(Batches(build(recipe), rank, world, 0, torch.device("cpu"))) for rank in range(world)]
    found = []
    for _ in range(steps):
        parts = [batch for rank in ranks for batch in next(rank)]
        fields = ("clean", "labels", "noise")
        found.append({name: torch.cat([getattr(part, name) for part in parts]) for name in fields})
    return found


@pytest.mark.parametrize("data", [{"crop": "random"}, STREAM, {**STREAM, "crop": "random"}])
def test_processes_accumulation_and_workers_change_no_sample(roots: dict[str, str], data: dict[str, Any]) -> None:
    def steps(world: int, accumulation: int = 1, workers: int = 0) -> list[dict[str, torch.Tensor]]:
        recipe = recipe_for(
            roots["hf"], "hf", data={**data, "num_workers": workers}, optim__batch_size=8,
            optim__accumulation=accumulation, optim__label_dropout=0.0,
        )  # fmt: skip
        return drawn(recipe, world, 5)

    whole = steps(1)
    for other in (steps(2), steps(4, 2), steps(1, 4, 2)):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(whole, other, strict=True) for name in a)
    assert not torch.equal(whole[0]["clean"], whole[1]["clean"])


def test_a_stream_shows_every_sample_once_an_epoch(roots: dict[str, str]) -> None:
    recipe = recipe_for(roots["hf"], "hf", data={**STREAM, "flip": False, "shuffle_buffer": 4}, optim__batch_size=6)
    steps = drawn(recipe, 1, 4)
    epochs = [torch.cat([steps[i]["clean"], steps[i + 1]["clean"]]) for i in (0, 2)]
    assert all(len(epoch.flatten(1).unique(dim=0)) == 12 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_folders_and_shards_of_the_same_pictures_hold_the_same(roots: dict[str, str]) -> None:
    built = {kind: build(recipe_for(root, kind)) for kind, root in roots.items()}
    found = {}
    for kind, each in built.items():
        samples = [each.dataset[index] for index in range(12)]
        found[kind] = sorted((label, picture.flatten().tolist()) for picture, label in samples)
    assert found["images"] == found["webdataset"] == found["hf"]


def test_random_crops_differ_from_step_to_step(roots: dict[str, str]) -> None:
    one = recipe_for(roots["webdataset"], "webdataset", data={"crop": "random", "flip": False}, optim__batch_size=12)
    steps = drawn(one, 1, 2)
    rows = [{tuple(row.tolist()) for row in step["clean"].flatten(1)} for step in steps]  # an epoch each
    assert len(rows[0] & rows[1]) <= 3


def test_a_stream_needs_steps_and_the_place_of_its_own_files(roots: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs.*train\.steps: nobody knows"):
        build(recipe_for(roots["hf"], "hf", data=STREAM, train__steps=None, train__epochs=2))
    run(recipe_for(roots["hf"], "hf", data=STREAM, train__steps=2), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())["sampler"]
    assert saved["dataset_length"] is None
    assert saved["stream"]["index"] == 1  # the window of position 8
    with pytest.raises(ConfigError, match=r"data\.shuffle_buffer: 5 in the checkpoint, 6 now"):
        run(recipe_for(roots["hf"], "hf", data={**STREAM, "shuffle_buffer": 6}), tmp_path / "run", resume="latest")


def test_a_resumed_run_does_not_read_the_stream_from_its_start(
    roots: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Row] = []
    following = _Endless.next
    monkeypatch.setattr(_Endless, "next", lambda self: read.append(following(self)) or read[-1])
    recipe = recipe_for(roots["hf"], "hf", data=STREAM)
    run(recipe, tmp_path / "run")
    whole = [row.value for row in read]
    read.clear()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(recipe, tmp_path / "run", resume="latest")
    assert [row.value for row in read] == whole[5:]  # from the window of position 8 on


# --- bad pictures are counted over all workers and processes together --------------------------------------------


@pytest.fixture
def six_bad(tmp_path: Path) -> str:
    for index, data in enumerate(pictures() * 2):
        folder = tmp_path / "pictures" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}.png").write_bytes(data if index % 4 else b"no picture")
    return str(tmp_path / "pictures")


def bad_run(root: str, limit: int, workers: int) -> Recipe:
    return recipe_for(
        root, "images", data={"max_bad_files": limit, "num_workers": workers}, optim__batch_size=4, train__steps=6,
        train__checkpoint_every=6,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 3])
def test_the_limit_holds_for_all_workers_together(six_bad: str, tmp_path: Path, workers: int) -> None:
    """Three workers meet two bad files each: every one of them alone stays within the limit."""
    with pytest.raises(DataError, match=r"number 6 of this run; expected at most 5 bad files"):
        run(bad_run(six_bad, 5, workers), tmp_path / "run")
    run(bad_run(six_bad, 6, workers), tmp_path / "six")


def test_the_limit_holds_for_all_processes_together_and_they_stop_at_once(six_bad: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom acdit.errors import DataError\n"
        "from tests.training.runs import run\nfrom tests.training.test_data_kinds import bad_run\n"
        "try:\n    run(bad_run(sys.argv[1], 5, 0), Path(sys.argv[2]))\n"
        "except DataError as error:\n    print(f'<{error}>', flush=True)\n"
    )
    (tmp_path / "two.py").write_text(script)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "two.py"), six_bad, str(tmp_path / "run")],
        check=True, timeout=300, capture_output=True, cwd=root, text=True,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.count("number 6 of this run; expected at most 5 bad files") == 2
