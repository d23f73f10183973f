"""The window: what is forgotten in training is forgotten in sampling, for ever and in constant memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from acdit import ACDiTTransformer, BlockLayout
from acdit.attention import SinkRotation, skip_causal_attention
from acdit.errors import ConfigError
from acdit.mask import Streams, Window
from acdit.rope import rotate, rotation
from tests.conftest import tiny_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "frames": {"grid": (4, 4, 4), "block": (1, 4, 4)},
    "frame parts": {"grid": (4, 4, 4), "block": (1, 2, 4)},
    "1-D": {"grid": (16,), "block": (4,)},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"window": 2},
    "one block": {"window": 1},
    "sinks": {"window": 3, "sink_blocks": 2},
    "sliding sinks": {"window": 2, "sink_blocks": 2, "sink_positions": "sliding"},
}


def windowed(layout: str, window: str, **options: Any) -> ACDiTTransformer:
    return tiny_model(**LAYOUTS[layout], **WINDOWS[window], **options)


def blocks_of(model: ACDiTTransformer, batch: int, count: int) -> torch.Tensor:
    return torch.randn(batch, count, model.layout.block_tokens, model.token_dim, dtype=torch.float64)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_windowed_cache_equals_the_training_forward_long_after_the_window_moved(layout: str, window: str) -> None:
    model = windowed(layout, window)
    count, batch = 4 * model.layout.num_blocks + 1, 2
    clean, noisy = blocks_of(model, batch, count), blocks_of(model, batch, count)
    timestep, labels = torch.rand(batch, count) * 999, torch.tensor([1, 5])
    with torch.no_grad():
        expected = model(clean, noisy, timestep, labels).sample
        cache = model.new_cache(batch)
        size = cache.nbytes
        for block in range(count):
            out = model.denoise(noisy[:, block], timestep[:, block], labels, cache)
            torch.testing.assert_close(out, expected[:, block], rtol=0, atol=1e-12)
            model.prefill(clean[:, block : block + 1], cache)
    assert cache.num_blocks == count
    assert cache.nbytes == size
    assert cache.length == (model.window.capacity) * model.layout.block_tokens


def test_a_moved_window_changes_the_prediction_so_the_equality_can_fail() -> None:
    """The same weights without the window, with another one, and with sinks that stay: all other numbers."""
    frames: dict[str, Any] = {"grid": (9, 4, 4), "block": (1, 4, 4)}
    kinds = {
        "none": tiny_model(**frames),
        **{name: tiny_model(**frames, **settings) for name, settings in WINDOWS.items()},
        "sinks that stay": tiny_model(**frames, window=2, sink_blocks=2),
    }
    clean, noisy = blocks_of(kinds["none"], 1, 9), blocks_of(kinds["none"], 1, 9)
    with torch.no_grad():
        last = {name: model(clean, noisy, 500).sample[:, -1] for name, model in kinds.items()}
    names = list(last)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert float((last[name] - last[other]).abs().max()) > 1e-6, (name, other)


@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_out_of_sight_changes_nothing(window: str) -> None:
    """With one layer the receptive field is the window: a forgotten block may be anything."""
    model = windowed("frames", window, num_layers=1)
    clean, noisy = blocks_of(model, 1, 9), blocks_of(model, 1, 9)
    seen = {index for start, stop in model.window.segments(8) for index in range(start, stop)}
    with torch.no_grad():
        before = model(clean, noisy, 500).sample[:, 8]
        for block in range(8):
            changed = clean.clone()
            changed[:, block] += 1
            moved = float((model(changed, noisy, 500).sample[:, 8] - before).abs().max())
            assert (moved > 1e-9) == (block in seen), block


def test_gradients_of_sliding_sinks_are_those_of_the_definition() -> None:
    """Against attention written down query by query, with the sinks' keys made at the moved positions."""
    window, count, length, width = Window(2, 1, slide=True), 7, 3, 8
    streams = Streams(count - 1, count, 2, length, window)
    shape = (2, streams.total, length, 2, width)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lags = torch.tensor([float(window.lag(block)) for block in range(count)])
    assert lags.tolist() == [0, 0, 0, 0, 1, 2, 3]
    cos, sin = rotation(lags[:, None] * length, width, (16,), (1,), "1d", torch.float64)
    sinks = SinkRotation(cos[:, None, None], sin[:, None, None], "1d")
    blocks = streams.block_of(torch.arange(streams.total)).tolist()
    outs = []
    for row, block in enumerate(blocks):
        keys, values = [k[:, row]], [v[:, row]]
        for key_block in range(min(block, streams.num_clean)):
            if key_block < window.sinks:
                keys.append(rotate(k[:, key_block], cos[block], sin[block], "1d"))
            elif key_block >= block - window.blocks:
                keys.append(k[:, key_block])
            else:
                continue
            values.append(v[:, key_block])
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, row], torch.cat(keys, 1)) / width**0.5
        outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat(values, 1)))
    expected = torch.stack(outs, dim=1)
    out = skip_causal_attention(q, k, v, streams, "auto", sinks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for grad, expected_grad in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_a_turned_key_is_a_moved_key() -> None:
    x, positions = torch.randn(5, 16, dtype=torch.float64), torch.randint(0, 9, (5, 3))
    moved = torch.tensor([4, 0, 0])

    def at(places: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return rotate(keys, *rotation(places, 16, (8, 8, 8), (2, 3, 3), "axial", torch.float64), "axial")

    torch.testing.assert_close(at(moved, at(positions, x)), at(positions + moved, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["frames", "frame parts"])
def test_sliding_sinks_stay_right_before_the_window(layout: str) -> None:
    """Along the first axis, in whole steps of it."""
    model = windowed(layout, "sliding sinks")
    rows = BlockLayout(**LAYOUTS[layout])
    per_step = rows.num_blocks // rows.block_grid[0]
    for block in range(3 * rows.num_blocks):
        lag = model.window.lag(block)
        turned = model._sink_rotation(model.window, block, 1)
        if turned is None:
            assert lag == 0
            continue
        time = lag // per_step
        expected = rotation(torch.tensor([time, 0, 0]), 16, rows.token_grid, (2, 3, 3), "axial", torch.float64)
        torch.testing.assert_close(turned.cos.flatten(), expected[0], rtol=0, atol=1e-12)
        assert 0 <= model.window.start(block) - model.window.sinks - time * per_step < per_step


@pytest.mark.parametrize("window", WINDOWS)
def test_many_blocks_at_once_are_one_after_the_other(window: str) -> None:
    model = windowed("frames", window)
    clean = blocks_of(model, 2, 11)
    at_once, one_by_one = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        model.prefill(clean, at_once)
        for block in clean.split(1, dim=1):
            model.prefill(block, one_by_one)
    for layer in range(at_once.num_layers):
        for ours, theirs in zip(at_once.prefix(layer), one_by_one.prefix(layer), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_fork_and_a_kept_cache_go_on_to_the_bit(window: str) -> None:
    model = windowed("frames", window)
    clean, noisy = blocks_of(model, 2, 13), blocks_of(model, 2, 13)
    cache = model.new_cache(2)
    with torch.no_grad():
        model.prefill(clean[:, :9], cache)
        kept = {name: tensor.clone() for name, tensor in cache.tensors().items()}
        restored, fork = model.new_cache(2), cache.fork(1)
        restored.restore(kept, json.loads(json.dumps(cache.facts())))
        for block in range(9, 13):
            outs = [model.denoise(noisy[:, block], 300, None, one) for one in (cache, restored, fork)]
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])
            for one in (cache, restored, fork):
                model.prefill(clean[:, block : block + 1], one)


def test_a_cache_of_another_shape_is_not_taken_over() -> None:
    model, other = windowed("frames", "window"), windowed("1-D", "window")
    cache = model.new_cache(1)
    model.prefill(blocks_of(model, 1, 3), cache)
    with pytest.raises(ConfigError, match="kept cache"):
        other.new_cache(1).restore(cache.tensors(), cache.facts())
    with pytest.raises(ConfigError, match="kept cache"):
        model.new_cache(2).restore(cache.tensors(), cache.facts())


def test_another_window_than_the_trainings_must_be_asked_for() -> None:
    model = tiny_model(**LAYOUTS["frames"])
    cache = model.new_cache(1, window=Window(2))
    clean = blocks_of(model, 1, 20)
    with torch.no_grad():
        model.prefill(clean, cache)  # more than the grid has: there is always room
    assert cache.num_blocks == 20
    assert cache.length == 2 * model.layout.block_tokens


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"window": 0}, "at least 1"),
        ({"window": 2, "sink_blocks": -1}, "at least 0"),
        ({"sink_blocks": 1}, "without a window"),
        ({"window": 2, "sink_positions": "sliding"}, "without sinks"),
        ({"window": 2, "sink_positions": "elsewhere"}, "one of"),
        ({"window": 2, "sink_blocks": 1, "sink_positions": "sliding", "rope": "reference"}, "no rotation"),
    ],
)
def test_windows_that_cannot_be(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_model(**LAYOUTS["frames"], **settings)
