"""Closed forms of cost against what is counted and allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acdit import ACDiTTransformer, costs
from acdit.analysis.allocations import allocated_peak
from acdit.corruption import GaussianCorruption
from acdit.costs import Architecture
from acdit.errors import ConfigError
from acdit.mask import Streams, Window, dense_mask
from acdit.model import PRESETS
from acdit.products import CPU_MULTIPLIES_BF16
from acdit.recompute import checkpoint_elementwise
from acdit.sampling import sample_blocks
from acdit.training import Trainer
from acdit.training.batches import Batches
from tests.training.runs import tiny_recipe

MODELS: dict[str, dict[str, Any]] = {
    "squares": {"grid": (16, 16), "block": (8, 8), "num_layers": 3, "num_attention_heads": 2, "batch": 2},
    "one block": {"grid": (12, 12), "block": (12, 12), "num_layers": 2, "num_attention_heads": 2, "batch": 2},
    "frames, two copies": {
        "grid": (4, 8, 8), "block": (1, 8, 8), "num_layers": 2, "num_attention_heads": 3, "batch": 1, "copies": 2,
    },
    "narrow MLP": {
        "grid": (16, 16), "block": (4, 8), "num_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2.0, "batch": 1,
    },
    "one layer": {"grid": (16, 16), "block": (8, 8), "num_layers": 1, "num_attention_heads": 2, "batch": 2},
    "window and a sink": {
        "grid": (8, 4, 4), "block": (1, 4, 4), "num_layers": 2, "num_attention_heads": 2, "batch": 2, "window": 2,
        "sink_blocks": 1,
    },
}  # fmt: skip
MODES = ("none", "elementwise", "layers")


def step_of(name: str, checkpointing: str, precision: str = "fp32") -> tuple[Architecture, int, int, Callable[[], Any]]:
    """Architecture, batch, copies, and forward + backward of one micro-batch."""
    settings = dict(MODELS[name])
    batch, copies = settings.pop("batch"), settings.pop("copies", 1)
    model = ACDiTTransformer(num_classes=10, attention_head_dim=64, in_channels=4, **settings)
    if checkpointing == "elementwise":
        model.enable_gradient_checkpointing(checkpoint_elementwise)
    elif checkpointing == "layers":
        model.enable_gradient_checkpointing()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layout, corruption = model.layout, GaussianCorruption()
    clean = torch.randn(batch, 1, layout.num_blocks, layout.block_tokens, model.token_dim)
    noise = torch.randn(batch, copies, *clean.shape[2:])
    timestep = torch.randint(1000, (batch, copies, layout.num_blocks))
    labels = torch.randint(10, (batch,))

    def run() -> None:
        noisy = corruption.corrupt(clean, noise, timestep)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            (prediction,) = model(clean[:, 0], noisy, timestep, labels, return_dict=False)
        corruption.loss(prediction, clean, noise, timestep).backward()

    return Architecture.of(model.config), batch, copies, run


def counted_flops(run: Callable[[], Any]) -> float:
    """By torch's counter, which knows no attention of the CPU: its products are counted from the mask itself."""

    def pairs(q: tuple[int, ...], num_clean: int, num_blocks: int, copies: int, window: int, sinks: int) -> int:
        streams = Streams(num_clean, num_blocks, copies, q[2], Window(window, sinks) if window else None)
        return int(dense_mask(streams, streams.total - q[1]).sum()) * q[0] * q[3] * q[4]

    def forward(q: Any, k: Any, v: Any, *streams: int, out_shape: Any = None) -> int:
        return 4 * pairs(q, *streams)

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *streams: int, out_shape: Any = None) -> int:
        return 10 * pairs(q, *streams)

    def plain(q: Any, k: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    operators = torch.ops
    mapping = {
        operators.acdit.blockwise_attention: forward,
        operators.acdit.blockwise_attention_backward: backward,
        operators.aten._scaled_dot_product_flash_attention_for_cpu: plain,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "count"), [("B", 130_305_028), ("L", 457_851_908), ("XL", 674_856_708)])
def test_parameters_are_those_of_the_references_models(name: str, count: int) -> None:
    with torch.device("meta"):
        image = ACDiTTransformer((32, 32), (16, 16), in_channels=4, num_classes=1000, **PRESETS[name])
    assert Architecture.of(image.config).parameters == count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", MODES)
def test_a_steps_flops_are_the_counted_ones(name: str, checkpointing: str) -> None:
    arch, batch, copies, run = step_of(name, checkpointing)
    assert costs.training_flops(arch, batch, copies, checkpointing) == pytest.approx(counted_flops(run), rel=2e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_pictures_flops_are_the_counted_ones(guidance_scale: float) -> None:
    model = ACDiTTransformer(
        (16, 16), (8, 8), num_layers=2, num_attention_heads=2, attention_head_dim=32, num_classes=10
    )
    scheduler = GaussianCorruption().sampling_scheduler()
    counted = counted_flops(
        lambda: list(
            sample_blocks(
                model, scheduler, class_labels=torch.tensor([1, 2]), num_inference_steps=3,
                guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0),
            )
        )
    )  # fmt: skip
    drawn = costs.picture_flops(Architecture.of(model.config), steps=3, guided=guidance_scale != 1)
    assert 2 * drawn == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", MODES)
def test_the_activation_peak_is_the_allocators(name: str, checkpointing: str) -> None:
    arch, batch, copies, run = step_of(name, checkpointing)
    predicted = costs.activation_peak(arch, batch, copies, checkpointing=checkpointing)
    assert predicted == pytest.approx(allocated_peak(run), rel=0.05)


@pytest.mark.skipif(CPU_MULTIPLIES_BF16, reason="where bf16 is multiplied the kernels' own buffers are not predicted")
@pytest.mark.parametrize("checkpointing", MODES)
def test_the_activation_peak_in_bf16_is_the_allocators(checkpointing: str) -> None:
    arch, batch, copies, run = step_of("squares", checkpointing, "bf16")
    predicted = costs.activation_peak(
        arch, batch, copies, checkpointing=checkpointing, precision="bf16", bf16_units=False
    )
    assert predicted == pytest.approx(allocated_peak(run), rel=0.1)


@pytest.mark.parametrize("case", ["activations weigh most", "weights weigh most", "weights, accumulated"])
def test_a_whole_run_holds_at_most_what_is_planned(case: str, tmp_path: Path) -> None:
    wide = case != "activations weigh most"
    recipe = tiny_recipe(
        model={
            "grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 3, "num_classes": 10,
            "num_attention_heads": 4 if wide else 2, "attention_head_dim": 64 if wide else 32,
        },
        optim__batch_size=32 if not wide else 2,
        optim__accumulation=2 if case == "weights, accumulated" else 1,
    )  # fmt: skip
    held = {}

    def run() -> None:
        trainer = Trainer(recipe, tmp_path, progress=False)
        batches = iter(Batches(trainer.built, 0, 1, 0, torch.device("cpu")))
        for _ in range(2):
            trainer._step(trainer.state.model, next(batches))
        held["arch"] = Architecture.of(trainer.built.model.config)
        held["moments"] = sum(
            value.nbytes
            for moments in trainer.state.optimizer.state.values()
            for name, value in moments.items()
            if name != "step"
        )

    measured = allocated_peak(run)
    parts = recipe.optim.accumulation
    plan = costs.training_memory(held["arch"], recipe.optim.batch_size // parts, averages=2, accumulation=parts)
    assert plan.optimizer == held["moments"]
    assert plan.total == pytest.approx(measured, rel=0.15)


def test_sharding_divides_what_it_divides() -> None:
    with torch.device("meta"):
        model = ACDiTTransformer((32, 32), (16, 16), num_classes=1000, **PRESETS["XL"])
    arch = Architecture.of(model.config)
    alone = costs.training_memory(arch, 8)
    shared = costs.training_memory(arch, 8, devices=8)
    sharded = costs.training_memory(arch, 8, devices=8, sharding="fsdp")
    assert alone.communication == 0
    assert (shared.weights, shared.communication) == (alone.weights, alone.gradients)
    for part in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(sharded, part) == pytest.approx(getattr(alone, part) / 8, rel=1e-6)
    assert sharded.activations == alone.activations
    assert sharded.total < shared.total


def test_unknown_modes_are_refused() -> None:
    arch, *_ = step_of("one layer", "none")
    for wrong in ({"checkpointing": "all"}, {"precision": "fp8"}, {"sharding": "pipeline"}):
        with pytest.raises(ConfigError, match="expected one of"):
            costs.training_memory(arch, 1, **wrong)
