"""The loop: exact resumption, exact accumulation, and learning at all. Several processes: test_parallel.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from acdit import ACDiTPipeline, ACDiTTransformer
from acdit.corruption import GaussianCorruption
from acdit.training import Trainer, build
from acdit.training.batches import Batches, DataOrder
from tests.training.runs import largest_difference, run, state_hash, state_tensors, tiny_recipe

VARIANTS = {
    "plain": {},
    "two noisy copies": {"corruption__copies": 2},
    "accumulation": {"optim__accumulation": 2},
    "several epochs": {"optim__batch_size": 500, "optim__accumulation": 5},
    "cosine with warm-up, no clipping": {
        "optim__schedule": "cosine", "optim__warmup_steps": 3, "optim__max_grad_norm": None
    },
    "flow, min-SNR, flips, shifts": {
        "corruption__prediction_type": "flow_prediction", "corruption__min_snr_gamma": 5.0, "data__flip": True,
        "data__shift": 2,
    },
    "noisy context": {"corruption__context_noise": 0.5, "corruption__copies": 2},
    "bf16": {"train__precision": "bf16"},
    "elementwise checkpointing": {"train__gradient_checkpointing": "elementwise"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(variant: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(**VARIANTS[variant])
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    resumed = run(recipe, tmp_path / "cut", resume="latest")
    assert state_hash(resumed) == state_hash(whole)
    logs = [
        [json.loads(line) for line in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut")
    ]
    drop = ("samples_per_second", "seconds")
    assert [{k: v for k, v in line.items() if k not in drop} for line in logs[0]] == [
        {k: v for k, v in line.items() if k not in drop} for line in logs[1]
    ]
    published = [
        load_file(tmp_path / d / "model/transformer/diffusion_pytorch_model.safetensors") for d in ("whole", "cut")
    ]
    assert all(torch.equal(published[0][name], published[1][name]) for name in published[0])


def test_a_log_interval_cut_by_a_kill_averages_all_its_steps(tmp_path: Path) -> None:
    recipe = tiny_recipe(train__log_every=5, train__steps=6)
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    run(recipe, tmp_path / "cut", resume="checkpoint-2")
    losses = [[json.loads(line)["loss"] for line in (tmp_path / d / "log.jsonl").open()] for d in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_every_moving_part_is_in_the_hash(tmp_path: Path) -> None:
    """The hash the tests above compare sees weights, both averages and both moments."""
    names = state_tensors(run(tiny_recipe(), tmp_path))
    assert {name.split(".")[0] for name in names} == {"model", "ema0", "ema1", "moment"}
    assert {name.rsplit(".")[-1] for name in names if name.startswith("moment")} == {"step", "exp_avg", "exp_avg_sq"}


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    options = {"train__precision": "fp64", "optim__batch_size": 8}
    whole = run(tiny_recipe(**options), tmp_path / "1")
    for parts in (2, 8):
        cut = run(tiny_recipe(**options, optim__accumulation=parts), tmp_path / str(parts))
        assert largest_difference(cut, whole) <= 1e-10


def test_a_tiny_model_learns_four_pictures_by_heart(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train__steps=150, train__checkpoint_every=150, train__log_every=5, optim__lr=1e-2, optim__batch_size=16,
        model={"grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 16, "num_classes": 10},
    )  # fmt: skip
    trainer = Trainer(recipe, tmp_path, progress=False)
    dataset = trainer.built.dataset
    dataset.images, dataset.labels = dataset.images[:4], dataset.labels[:4]  # type: ignore[attr-defined]
    trainer.train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert losses[0] > 0.6
    assert sum(losses[-4:]) / 4 < 0.2


def test_micro_batches_and_ranks_cut_one_global_batch() -> None:
    changes = {"data__flip": True, "data__shift": 1}
    built = build(tiny_recipe(optim__batch_size=8, corruption__copies=2, **changes))

    def draw(world: int, accumulation: int, step: int) -> dict[str, torch.Tensor]:
        cut = dataclasses.replace(built, recipe=tiny_recipe(
            optim__batch_size=8, optim__accumulation=accumulation, corruption__copies=2, **changes))  # fmt: skip
        parts = []
        for rank in range(world):
            parts += next(iter(Batches(cut, rank, world, step, torch.device("cpu"))))
        fields = ("clean", "noise", "timestep", "labels")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}

    for step in (0, 5, 400):
        whole = draw(1, 1, step)
        assert whole["noise"].shape == (8, 2, 4, 16, 1)
        for world, accumulation in ((2, 1), (1, 4), (2, 2), (4, 2)):
            cut = draw(world, accumulation, step)
            assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(draw(1, 1, 0)["noise"], draw(1, 1, 1)["noise"])


def test_pictures_are_shifted_each_its_own_way_within_reach() -> None:
    plain, moved = (
        next(iter(Batches(build(tiny_recipe(optim__batch_size=200, data__shift=reach)), 0, 1, 0, torch.device("cpu"))))
        for reach in (0, 1)
    )
    layout = build(tiny_recipe()).model.layout
    before, after = (layout.from_blocks(batch.clean)[:, 0] for (batch,) in (plain, moved))
    found = set()
    for one, other in zip(before, after, strict=True):
        framed = torch.nn.functional.pad(one, (1, 1, 1, 1), value=-1.0)  # black
        ways = [
            (down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)
            if torch.equal(framed[1 - down : 9 - down, 1 - right : 9 - right], other)
        ]  # fmt: skip
        assert ways
        found |= {ways[0]} if len(ways) == 1 else set()
    assert len(found) == 9


def test_every_epoch_shows_every_sample_once_in_another_order() -> None:
    order = DataOrder(10, seed=1)
    seen = [order.indices(start, 5).tolist() for start in range(0, 30, 5)]
    epochs = [seen[0] + seen[1], seen[2] + seen[3], seen[4] + seen[5]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert DataOrder(10, seed=1).indices(8, 4).tolist() == (epochs[0] + epochs[1])[8:12]


def test_labels_are_dropped_as_often_as_asked() -> None:
    built = build(tiny_recipe(optim__batch_size=500, optim__label_dropout=0.3))
    batches = iter(Batches(built, 0, 1, 0, torch.device("cpu")))
    labels = torch.cat([next(batches)[0].labels for _ in range(8)])
    assert abs((labels == built.model.null_label).float().mean() - 0.3) < 0.03
    never = build(tiny_recipe(optim__batch_size=500, optim__label_dropout=0.0))
    assert (next(iter(Batches(never, 0, 1, 0, torch.device("cpu"))))[0].labels < 10).all()


def test_a_run_leaves_what_the_readme_promises(tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(pipeline: ACDiTPipeline, step: int) -> dict[str, float]:
        seen.append(step)
        return {"score": 1.5}

    recipe = tiny_recipe(train__sample_every=3, train__tensorboard=True, sampling__num_inference_steps=1)
    trainer = run(recipe, tmp_path, evaluate=evaluate)
    for name in (
        "recipe.yaml",
        "log.jsonl",
        "loss.png",
        "samples/step-3.png",
        "samples/step-6.png",
        "model/model_index.json",
    ):
        assert (tmp_path / name).is_file(), name
    assert any((tmp_path / "tensorboard").iterdir())
    assert seen == [3, 6]
    assert any(json.loads(line).get("score") == 1.5 for line in (tmp_path / "log.jsonl").open())
    pipeline = ACDiTPipeline.from_pretrained(tmp_path / "model")
    average = trainer.state.ema.weights(0)
    assert all(torch.equal(value, average[name]) for name, value in pipeline.transformer.state_dict().items())
    other = ACDiTTransformer.from_pretrained(tmp_path / "model/transformer", variant="ema-0_9")
    average = trainer.state.ema.weights(1)
    assert all(torch.equal(value, average[name]) for name, value in other.state_dict().items())
    whole = ACDiTPipeline.from_pretrained(tmp_path / "model", variant="ema-0_9")
    assert all(torch.equal(value, average[name]) for name, value in whole.transformer.state_dict().items())
    assert pipeline.get_label_ids("7") == [7]


def test_looking_at_the_averages_leaves_training_alone(tmp_path: Path) -> None:
    quiet = run(tiny_recipe(), tmp_path / "quiet")
    looking = run(tiny_recipe(train__sample_every=1), tmp_path / "looking", evaluate=lambda *_: {"score": 1.0})
    assert state_hash(looking) == state_hash(quiet)


def test_the_decay_can_start_from_a_checkpoint_of_the_constant_phase(tmp_path: Path) -> None:
    constant = tiny_recipe(optim__schedule="constant", train__steps=4)
    run(constant, tmp_path / "constant")
    branch = tiny_recipe(optim__schedule="wsd", optim__decay_fraction=0.5, train__steps=8, train__log_every=1)
    trainer = run(branch, tmp_path / "branch", branch_from=tmp_path / "constant" / "checkpoint-4")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "branch" / "log.jsonl").open()]
    assert rates == pytest.approx([3e-3 * 0.5 ** (6 * (step - 4) / 4) for step in range(5, 9)])
    assert trainer.state.step == 8
    assert (tmp_path / "constant" / "checkpoint-4").is_dir()


def test_compiled_training_learns_the_same(tmp_path: Path) -> None:
    eager = run(tiny_recipe(train__precision="fp64", train__steps=2), tmp_path / "eager")
    compiled = run(tiny_recipe(train__precision="fp64", train__steps=2, train__compile=True), tmp_path / "compiled")
    assert largest_difference(compiled, eager) <= 1e-6


def test_the_loss_is_the_papers() -> None:
    """Σ over blocks of ‖ε_θ(noisy_i; t_i, clean_<i) − ε_i‖², as a mean (equation 3)."""
    trainer_recipe = tiny_recipe()
    built = build(trainer_recipe)
    batch = next(iter(Batches(built, 0, 1, 0, torch.device("cpu"))))[0]
    corruption = GaussianCorruption()
    noisy = corruption.corrupt(batch.clean[:, None], batch.noise, batch.timestep)
    prediction = built.model(batch.clean, noisy, batch.timestep, batch.labels).sample
    by_hand = torch.stack([(prediction[:, 0, i] - batch.noise[:, 0, i]).square().mean() for i in range(4)]).mean()
    torch.testing.assert_close(corruption.loss(prediction, batch.clean[:, None], batch.noise, batch.timestep), by_hand)
