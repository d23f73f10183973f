"""FLOPs: torch's counter beside the closed forms, part by part; the counter's formulas beside the mask itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acdit import ACDiTTransformer
from acdit.analysis.counting import count_sampling, count_training, formulas
from acdit.attention import skip_causal_attention
from acdit.corruption import GaussianCorruption
from acdit.flops import Architecture, forward_parts, layer_flops, sampling_parts, saving, training_flops
from acdit.mask import Streams, Window, dense_mask
from acdit.model import PRESETS
from acdit.products import linear
from acdit.sampling import sample_blocks

MODELS: dict[str, dict[str, Any]] = {
    "squares": {"grid": (16, 16), "block": (8, 8), "num_layers": 3, "num_classes": 10},
    "one block": {"grid": (12, 12), "block": (12, 12), "num_layers": 2, "num_classes": 10},
    "one layer, token by token": {"grid": (4, 4), "block": (1, 1), "num_layers": 1},
    "video, whole frames": {"grid": (4, 8, 8), "block": (1, 4, 4), "patch": (1, 2, 2), "num_layers": 2},
    "video, parts of frames, window and sink": {
        "grid": (8, 4, 4), "block": (1, 2, 4), "num_layers": 3, "window": 3, "sink_blocks": 2, "mlp_ratio": 2.0,
    },
    "text": {
        "grid": (24,), "block": (4,), "num_layers": 2, "vocab_size": 31, "time_conditioning": False,
    },
    "text that is told t": {"grid": (24,), "block": (24,), "num_layers": 2, "vocab_size": 31},
    "the paper's L": {"grid": (32, 32), "block": (16, 16), "num_classes": 1000, **PRESETS["L"]},
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    settings = {"num_attention_heads": 3, "attention_head_dim": 32, **MODELS[name]}
    with torch.device("meta"):
        return dict(ACDiTTransformer(**settings).config)


def require_within_two_percent(closed: Any, counted: Any) -> None:
    for part, expected in asdict(closed).items():
        assert getattr(counted, part) == pytest.approx(expected, rel=0.02), part
    assert counted.total == pytest.approx(closed.total, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guided", [True, False])
def test_a_samples_parts_are_the_counted_ones(name: str, guided: bool) -> None:
    config = config_of(name)
    require_within_two_percent(sampling_parts(Architecture.of(config), 7, guided), count_sampling(config, 7, guided))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("copies", "checkpointing"), [(1, "none"), (2, "elementwise"), (1, "layers")])
def test_a_training_steps_parts_are_the_counted_ones(name: str, copies: int, checkpointing: str) -> None:
    config = config_of(name)
    arch, counted = Architecture.of(config), count_training(config, copies, checkpointing)
    require_within_two_percent(forward_parts(arch, copies), counted.forward)
    assert counted.total == pytest.approx(training_flops(arch, 1, copies, checkpointing), rel=0.02)


def test_what_the_sampler_really_does_is_what_is_counted() -> None:
    config = config_of("squares")
    model = ACDiTTransformer.from_config(config).eval()
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        blocks = sample_blocks(
            model, GaussianCorruption().sampling_scheduler(), class_labels=[3], num_inference_steps=4,
            guidance_scale=2.0, generator=0,
        )  # fmt: skip
        assert len(list(blocks)) == 4
    assert count_sampling(config, 4).total == counter.get_total_flops()


@pytest.mark.parametrize("window", [None, Window(1, 0), Window(2, 1)])
@pytest.mark.parametrize("last_layer", [False, True])
def test_attentions_formulas_count_the_masks_pairs(window: Window | None, last_layer: bool) -> None:
    """Against the dense mask, forward and backward; torch's own counter sees nothing there."""
    streams = Streams(num_clean=4, num_blocks=5, copies=2, block_tokens=3, window=window)
    first_query = streams.num_clean if last_layer else 0
    q, k, v = (torch.randn(2, streams.total, 3, 2, 8, requires_grad=True) for _ in range(3))
    plain, ours = FlopCounterMode(display=False), FlopCounterMode(display=False, custom_mapping=formulas())
    with plain, ours:
        out = skip_causal_attention(q[:, first_query:], k, v, streams, "sdpa")
        forward = ours.get_total_flops()
        out.square().sum().backward()
    pairs = int(dense_mask(streams, first_query).sum()) * 2 * 2 * 8
    assert forward == 4 * pairs
    assert ours.get_total_flops() == 14 * pairs
    assert plain.get_total_flops() == 0


def test_products_of_bf16_on_the_fp32_units_are_counted_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acdit.products.CPU_MULTIPLIES_BF16", False)
    x, weight = (torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 5, 7), (11, 7)))
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        linear(x, weight).float().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 7 * 11


@pytest.mark.parametrize("block", [(16, 16), (8, 8), (4, 4), (2, 2)])
def test_the_papers_saving_is_that_of_the_counted_layers(block: tuple[int, int]) -> None:
    config = config_of("squares") | {"grid": (16, 16), "block": block}
    arch = Architecture.of(config)
    one_step = [count_sampling(config | {"block": size}, 1, False).layers for size in (block, (16, 16))]
    assert 1 - one_step[0] / one_step[1] == pytest.approx(saving(arch), rel=1e-9, abs=1e-12)
    assert one_step[0] == arch.num_layers * layer_flops(arch)
    assert one_step[1] == arch.num_layers * layer_flops(arch, full_sequence=True)


def test_the_saving_goes_to_one_half_where_attention_is_everything() -> None:
    long = Architecture.of(config_of("squares") | {"grid": (4096, 4096), "block": (1, 1)})
    assert 0.499 < saving(long) < 0.5
    assert long.theta == 12 * long.width**2
