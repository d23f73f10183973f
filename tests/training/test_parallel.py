"""DDP and FSDP2 on gloo processes: the same run as one process, at any size, and together in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from acdit import ACDiTPipeline, storage
from acdit.cli import main
from acdit.errors import ConfigError, StorageError
from acdit.recipe import recipe_to_yaml
from acdit.training.consolidate import consolidate
from acdit.training.history import committed_checkpoints
from acdit.training.shards import Part
from tests.training.runs import run, tiny_recipe
from tests.training.worker import BF16, EXACT, FSDP2, LAYERS

TOLERANCE = 1e-10
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def launch(scenario: str, directory: Path, processes: int) -> None:
    """torchrun of the worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*command, "tests.training.worker", scenario, str(directory)],
        env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def cut_to(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run that was killed right after its checkpoint of a step."""
    shutil.copytree(run, copy)
    for later, path in committed_checkpoints(copy):
        if later > step:
            shutil.rmtree(path)
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes, one of four, and the runs of one process, all of the same recipe."""
    directory = tmp_path_factory.mktemp("runs")
    run(tiny_recipe(**EXACT), directory / "one")
    run(tiny_recipe(**{**EXACT, **LAYERS}), directory / "one-two-layers")
    run(tiny_recipe(**FSDP2), directory / "fsdp2-1")
    run(tiny_recipe(**BF16), directory / "bf16-1")
    launch("two", directory, 2)
    cut_to(directory / "fsdp2-2", 2, directory / "fsdp2-2-to-4")
    cut_to(directory / "fsdp2-2", 2, directory / "fsdp2-2-to-ddp-4")
    cut_to(directory / "ddp-2", 2, directory / "ddp-2-to-fsdp2-4")
    launch("four", directory, 4)
    return directory


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments, put together."""
    shards = json.loads((checkpoint / "state.json").read_text())["shards"]
    parts = {part: Part(checkpoint, part, shards) for part in ("model", "ema-0", "ema-1", "optimizer")}
    return {f"{part}.{name}": source.tensor(name) for part, source in parts.items() for name in source.names}


def assert_equal_runs(one: Path, other: Path) -> None:
    """All state of the last checkpoints, the log, and the published model."""
    left, right = state_of(one / "checkpoint-4"), state_of(other / "checkpoint-4")
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape
        assert float((value - right[name]).norm()) <= TOLERANCE * (float(value.norm()) + 1e-12), name
    logs = [[json.loads(line) for line in (place / "log.jsonl").open()] for place in (one, other)]
    logs = [[line for line in log if "loss" in line] for log in logs]
    for key in ("step", "loss", "lr", "gradient_norm"):  # the norm before clipping: it sees a wrong scale; fp32 losses
        assert [line[key] for line in logs[1]] == pytest.approx([line[key] for line in logs[0]], rel=1e-6)
    for file in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.ema-0_9.safetensors"):
        model, twin = load_file(one / "model/transformer" / file), load_file(other / "model/transformer" / file)
        assert all(torch.allclose(model[name], twin[name], rtol=0, atol=1e-11) for name in model)
    assert storage.verify(other / "checkpoint-4")


@pytest.mark.parametrize("name", ["fsdp2-1", "ddp-2", "fsdp2-2", "ddp-4", "fsdp2-4"])
def test_any_number_of_processes_is_one_process(runs: Path, name: str) -> None:
    assert_equal_runs(runs / "one", runs / name)
    state = json.loads((runs / name / "checkpoint-4" / "state.json").read_text())
    assert state["environment"]["world_size"] == int(name[-1])
    assert state["shards"] == (int(name[-1]) if "fsdp2" in name else 1)


@pytest.mark.parametrize("mode", ["elementwise", "layers"])
def test_gradient_checkpointing_changes_nothing_under_fsdp2(runs: Path, mode: str) -> None:
    assert_equal_runs(runs / "one-two-layers", runs / f"fsdp2-2-{mode}")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_bf16_differs_by_its_rounding_only(runs: Path, name: str) -> None:
    """Two processes against one. A process's share has other shapes, so sums may round in another order.

    Where a processor rounds a gradient to bf16 in every share, each side is off by up to 2⁻⁸ of it: 2⁻⁷ apart. (Where
    products are summed in fp32, as here without a bf16 unit, it is 1e-7.) A gradient that is not shared, or scaled
    twice, is off by 1 or more. Adam then divides every element by its size: those that are smaller than the rounding
    may go either way, so weights are compared by how far they are apart, against how far they have come.
    """
    one, two = runs / "bf16-1", runs / f"bf16-{name}-2"
    first, other = state_of(one / "checkpoint-1"), state_of(two / "checkpoint-1")
    moments = [key for key in first if key.endswith(".exp_avg")]
    assert moments
    for key in moments:
        assert first[key].dtype == other[key].dtype == torch.float32
        assert float((first[key] - other[key]).norm()) <= 2**-7 * float(first[key].norm()), key
    logs = [[json.loads(line) for line in (place / "log.jsonl").open()] for place in (one, two)]
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in logs[1]] == pytest.approx([line[key] for line in logs[0]], rel=2**-7), key
    exact = json.loads((runs / "one" / "log.jsonl").read_text().splitlines()[-1])
    assert abs(logs[1][-1]["loss"] / exact["loss"] - 1) > 1e-6  # it is bf16 indeed
    last, apart, come = state_of(one / "checkpoint-4"), 0.0, 0.0
    for key, value in state_of(two / "checkpoint-4").items():
        if key.startswith("model."):
            apart += float((value - last[key]).square().sum())
            come += float((last[key] - first[key]).square().sum())
    assert apart <= 0.1**2 * come


@pytest.mark.parametrize("name", ["fsdp2-2-to-4", "fsdp2-2-to-ddp-4", "ddp-2-to-fsdp2-4"])
def test_four_processes_go_on_where_two_stopped(runs: Path, name: str) -> None:
    """Reliability row 9: the run that nobody interrupted, at another size and under the other way of sharing."""
    assert_equal_runs(runs / "one", runs / name)


@pytest.mark.parametrize(
    ("source", "options"), [("fsdp2-2", EXACT), ("fsdp2-4", FSDP2), ("ddp-2", EXACT)], ids=["to-ddp", "to-fsdp2", "ddp"]
)
def test_one_process_goes_on_where_several_stopped(
    runs: Path, source: str, options: dict[str, object], tmp_path: Path
) -> None:
    run(tiny_recipe(**options), cut_to(runs / source, 2, tmp_path / "run"), resume="latest")
    assert_equal_runs(runs / "one", tmp_path / "run")


@pytest.mark.campaign
@pytest.mark.parametrize("mode", ["none", "elementwise", "layers"])
def test_compiled_fsdp2_trains_the_same(mode: str, tmp_path: Path) -> None:
    options = {**EXACT, "train__steps": 2}
    eager = run(tiny_recipe(**options), tmp_path / "eager")
    compiled = {"train__parallel": "fsdp2", "train__compile": True, "train__gradient_checkpointing": mode}
    run(tiny_recipe(**options, **compiled), tmp_path / "compiled")
    weights = load_file(tmp_path / "compiled/checkpoint-2/model.safetensors")
    for name, value in eager.state.model.state_dict().items():
        assert float((value - weights[name]).norm()) <= TOLERANCE * (float(value.norm()) + 1e-12), name


def test_every_process_writes_its_rows_only(runs: Path) -> None:
    checkpoint = runs / "fsdp2-4" / "checkpoint-4"
    whole = runs / "one" / "checkpoint-4"
    for part in ("model", "ema-0", "optimizer"):
        sizes = [file.stat().st_size for file in sorted(checkpoint.glob(f"{part}-0*-of-00004.safetensors"))]
        assert len(sizes) == 4
        assert max(sizes) < 0.5 * (whole / f"{part}.safetensors").stat().st_size
    source = Part(checkpoint, "model", 4)
    full = load_file(whole / "model.safetensors")["y_embedder.weight"]
    assert source.shape("y_embedder.weight") == (11, 8)
    for start, stop in ((0, 11), (2, 4), (3, 6), (10, 11)):
        torch.testing.assert_close(source.rows("y_embedder.weight", start, stop), full[start:stop])


def test_samples_are_drawn_under_fsdp2(runs: Path) -> None:
    assert (runs / "fsdp2-2/samples/step-4.png").is_file()


def test_a_checkpoint_becomes_one_model_folder(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "fsdp2-4" / "checkpoint-4"
    assert main(["consolidate", str(checkpoint), str(tmp_path / "average")]) == 0
    pipeline = ACDiTPipeline.from_pretrained(tmp_path / "average")
    published = ACDiTPipeline.from_pretrained(runs / "fsdp2-4" / "model")
    assert pipeline.config.id2label == published.config.id2label
    pictures = [
        each(class_labels=[3], num_inference_steps=1, generator=0, output_type="pt").images
        for each in (pipeline, published)
    ]
    assert torch.equal(*pictures)
    for place in (checkpoint, runs / "one" / "checkpoint-4"):
        raw = consolidate(place, tmp_path / f"raw-{place.parent.name}", weights="raw")
        expected = load_file(runs / "one/checkpoint-4/model.safetensors")
        for name, value in ACDiTPipeline.from_pretrained(raw).transformer.state_dict().items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-8)
    with pytest.raises(ConfigError, match=r"0\.5.*0\.99, 0\.9"):
        consolidate(checkpoint, tmp_path / "none", decay=0.5)
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "ema-0-00003-of-00004.safetensors").unlink()
    with pytest.raises(StorageError, match="ema-0-00003-of-00004"):
        consolidate(broken, tmp_path / "none")
    (broken / "manifest.json").unlink()
    with pytest.raises(StorageError, match="ema-0-00003-of-00004"):
        Part(broken, "ema-0", 4)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("case", ["ddp-0", "fsdp2-0", "fsdp2-1"])
def test_a_save_that_fails_on_one_process_ends_all_with_exit_5(runs: Path, case: str) -> None:
    """Reliability row 17; the checkpoint before stays and nothing half-written is left."""
    place = runs / f"full-{case}"
    assert [json.loads((place / f"code-{rank}").read_text()) for rank in (0, 1)] == [5, 5]
    assert [step for step, _ in committed_checkpoints(place / "run")] == [2]
    assert storage.verify(place / "run" / "checkpoint-2")
    assert not list((place / "run").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("parallel", "fault"),
    [
        ("ddp", signal.SIGKILL),
        pytest.param("fsdp2", signal.SIGKILL, marks=pytest.mark.campaign),
        pytest.param("ddp", signal.SIGSTOP, marks=pytest.mark.campaign),  # alive, and no answer: the timeout's case
    ],
)
def test_a_lost_process_ends_the_others_with_exit_6(parallel: str, fault: signal.Signals, tmp_path: Path) -> None:
    """Reliability row 16, without a launcher: the process that is left ends by itself."""
    timeout = 60
    recipe = tmp_path / "recipe.yaml"
    options = {"train__steps": 10**6, "train__checkpoint_every": 10**6, "train__log_every": 1}
    recipe.write_text(recipe_to_yaml(tiny_recipe(**options, train__parallel=parallel, train__timeout_seconds=timeout)))
    command = [sys.executable, "-m", "acdit.cli", "train", str(recipe), "--output", str(tmp_path / "run")]
    port = 20000 + os.getpid() % 20000 + (2 * (parallel == "fsdp2") + (fault == signal.SIGSTOP))
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            command, env={**ENVIRONMENT, **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + 500
        while not (log.is_file() and log.stat().st_size) and time.monotonic() < until:
            assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
            time.sleep(0.2)
        processes[1].send_signal(fault)
        killed = time.monotonic()
        said = processes[0].communicate(timeout=timeout + 10)[1]
        assert time.monotonic() - killed < timeout + 10
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 6
    assert "another process of this run" in said
    assert "train.timeout_seconds" in said
    assert "Traceback" not in said
