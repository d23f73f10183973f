"""Memory: closed forms beside what torch's allocator hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acdit import ACDiTTransformer, costs
from acdit.analysis.allocations import allocated_by_sampling, allocated_by_training, allocated_peak
from acdit.errors import ConfigError
from acdit.flops import Architecture

MODELS: dict[str, dict[str, Any]] = {
    "squares": {"grid": (32, 32), "block": (16, 16), "num_classes": 10},
    "one block": {"grid": (24, 24), "block": (24, 24), "num_classes": 10},
    "video": {"grid": (8, 16, 16), "block": (2, 16, 16)},
    "window and sink": {"grid": (8, 16, 16), "block": (1, 16, 16), "window": 2, "sink_blocks": 1, "mlp_ratio": 2.0},
}


def config_of(name: str) -> dict[str, Any]:
    settings = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, **MODELS[name]}
    with torch.device("meta"):
        return dict(ACDiTTransformer(**settings).config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_peak_of_sampling_is_the_allocators(name: str, batch: int) -> None:
    config = config_of(name)
    guided = config["num_classes"] is not None
    closed = costs.sampling_memory(Architecture.of(config), batch, guided=guided)
    measured = allocated_by_sampling(config, batch, guided)
    assert closed.cache + closed.working == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_cache_are_the_models_own(name: str) -> None:
    config = config_of(name)
    model = ACDiTTransformer.from_config(config)
    closed = costs.sampling_memory(Architecture.of(config), 3, precision="bf16")
    model.to(torch.bfloat16)
    assert closed.cache == model.new_cache(3).nbytes
    assert closed.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert closed.total == closed.weights + closed.cache + closed.working


def test_the_peak_of_training_is_the_allocators() -> None:
    config = config_of("squares")
    closed = costs.activation_peak(Architecture.of(config), 2, 2)
    assert closed == pytest.approx(allocated_by_training(config, 2, 2, "none"), rel=0.05)


def test_what_an_earlier_recording_left_does_not_count_when_it_goes() -> None:
    left: list[torch.Tensor] = []
    assert allocated_peak(lambda: left.append(torch.zeros(1 << 20))) == 4 << 20

    def run() -> None:
        left.clear()
        held = torch.zeros(1 << 18)
        torch.add(held, held)

    assert allocated_peak(run) == 2 << 20


def test_text_is_not_run() -> None:
    with torch.device("meta"):
        config = dict(ACDiTTransformer((8,), (4,), vocab_size=5).config)
    for run in (lambda: allocated_by_sampling(config, 1, False), lambda: allocated_by_training(config, 1, 1, "none")):
        with pytest.raises(ConfigError, match="a model of text"):
            run()
