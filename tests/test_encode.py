"""Features of the clean stream: what `prefill` computes, who sees what, block by block, and through gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acdit import ACDiTTransformer
from acdit.errors import ConfigError
from acdit.layers import ACDiTLayer
from acdit.recompute import checkpoint_elementwise
from tests.conftest import awaken, blocks_like, tiny_model
from tests.test_model import LAYOUTS, model_for

KINDS = {
    "plain": {},
    "window": {"window": 1},
    "window and sinks": {"window": 1, "sink_blocks": 1},
    "sliding sinks": {"window": 1, "sink_blocks": 1, "sink_positions": "sliding"},
}


def text_model() -> ACDiTTransformer:
    model = ACDiTTransformer(
        grid=(24,), block=(4,), num_layers=2, num_attention_heads=2, attention_head_dim=8, vocab_size=11
    )
    return awaken(model).double()


def outputs_of_read(model: ACDiTTransformer, clean: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What every layer hands to the next while `prefill` reads block by block, (B, N, L, W) each. The last layer's
    output, which `prefill` never makes, is made by the same `read`."""
    outs: list[list[Tensor]] = [[] for _ in model.layers]
    read = ACDiTLayer.read

    def watched(self: ACDiTLayer, x: Tensor, rope: object, cache: object, index: int, last: bool) -> Tensor:
        x = read(self, x, rope, cache, index, False)  # type: ignore[arg-type]
        outs[index].append(x)
        return x

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(ACDiTLayer, "read", watched)
        cache = model.new_cache(clean.shape[0], clean.shape[1])
        for block in clean.split(1, dim=1):
            model.prefill(block, cache)
    return [torch.cat(parts, dim=1) for parts in outs]


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_are_what_prefill_computes_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for(name)
    clean = blocks_like(model, 3)
    expected = outputs_of_read(model, clean, monkeypatch)
    with torch.no_grad():
        found = model.encode(clean, [0, 1])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert torch.equal(model.encode(clean)[0], found[-1])
        swapped = model.encode(clean, [-1, 0])
        assert torch.equal(swapped[0], found[1])
        assert torch.equal(swapped[1], found[0])


def test_features_of_text_are_what_prefill_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    clean = torch.randint(11, (2, 6, 4))
    expected = outputs_of_read(model, clean, monkeypatch)
    for one, other in zip(model.encode(clean, [0, 1]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("execution", ["sdpa", "dense"])
def test_reading_on_from_a_cache_gives_the_features_of_all_at_once(kind: str, execution: str) -> None:
    model = tiny_model((10, 4), (2, 4), **KINDS[kind])
    model.attention_execution = execution
    clean = blocks_like(model, 2)
    with torch.no_grad():
        whole = model.encode(clean, [0, 1])
        cache = model.new_cache(2, model.layout.num_blocks)
        streamed = [model.encode(block, [0, 1], cache=cache) for block in clean.split(1, dim=1)]
        for layer in (0, 1):
            torch.testing.assert_close(
                torch.cat([one[layer] for one in streamed], dim=1), whole[layer], rtol=0, atol=1e-12
            )
        torch.testing.assert_close(model.encode(clean[:, :3])[0], whole[1][:, :3], rtol=0, atol=1e-12)


def test_a_cache_that_was_encoded_into_is_a_prefilled_one() -> None:
    model = tiny_model()
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)[:, 3]
    encoded, prefilled = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        model.encode(clean[:, :3], [0], cache=encoded)
        model.prefill(clean[:, :3], prefilled)
        one, other = (model.denoise(noisy, 400.0, torch.tensor([1, 2]), cache) for cache in (encoded, prefilled))
    assert torch.equal(one, other)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_later_block_changes_an_earlier_feature_only_where_both_directions_are_seen(bidirectional: bool) -> None:
    model = tiny_model()
    clean = blocks_like(model, 2)
    changed = clean.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        for one, other in zip(
            model.encode(clean, [0, 1], bidirectional=bidirectional),
            model.encode(changed, [0, 1], bidirectional=bidirectional),
            strict=True,
        ):
            same = [torch.equal(one[:, block], other[:, block]) for block in range(4)]
            assert same == [not bidirectional] * 2 + [False] * 2


def test_both_directions_are_one_block_of_everything() -> None:
    """A model of one block attends bidirectionally by itself: the same weights on the same tokens agree."""
    cut, whole = tiny_model((4, 8), (4, 4)), tiny_model((4, 8), (4, 8))
    data = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        found = cut.layout.from_blocks(cut.encode(cut.layout.to_blocks(data), bidirectional=True)[0])
        expected = whole.layout.from_blocks(whole.encode(whole.layout.to_blocks(data))[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_features_do_not_depend_on_the_parameters_of_label_timestep_and_output() -> None:
    model = tiny_model()
    clean = blocks_like(model, 2)
    before = model.encode(clean)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.startswith(("t_embedder", "y_embedder", "final_layer")):
                parameter.add_(1)
    assert torch.equal(model.encode(clean)[0], before)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "layers", "elementwise"])
def test_gradients_are_those_of_finite_differences_however_activations_are_kept(
    bidirectional: bool, checkpointing: str
) -> None:
    model = tiny_model((4, 4), (2, 2))
    if checkpointing == "layers":
        model.enable_gradient_checkpointing()
    elif checkpointing == "elementwise":
        model.enable_gradient_checkpointing(checkpoint_elementwise)
    clean, weights = blocks_like(model, 1), torch.randn(1, 4, 4, 32, dtype=torch.float64)

    def value() -> Tensor:
        return (model.encode(clean, bidirectional=bidirectional)[0] * weights).sum()

    value().backward()
    parameter = model.layers[0].attn.qkv.weight
    direction = torch.randn_like(parameter)
    step = 1e-6
    with torch.no_grad():
        parameter.add_(direction, alpha=step)
        above = value()
        parameter.sub_(direction, alpha=2 * step)
        below = value()
    assert float((parameter.grad * direction).sum()) == pytest.approx(float((above - below) / (2 * step)), rel=1e-6)


def test_noisy_features_end_in_the_prediction_and_are_those_of_denoise() -> None:
    model = tiny_model()
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2, 3)
    timestep, labels = torch.rand(2, 3, 4) * 999, torch.tensor([1, 2])
    with torch.no_grad():
        last = model.encode_noisy(clean, noisy, timestep, labels)[0]
        assert last.shape == (2, 3, 4, 16, 32)
        condition = model._condition(timestep, labels, (2, 3, 4), keep_copies=True)
        assert torch.equal(model.final_layer(last, condition), model(clean, noisy, timestep, labels).sample)
        first = model.encode_noisy(clean, noisy[:, 0], timestep[:, 0], labels, [0, 1])
        torch.testing.assert_close(first[1], last[:, 0], rtol=0, atol=1e-12)
        changed = noisy[:, 0].clone()
        changed[:, 1] += 1
        other = model.encode_noisy(clean, changed, timestep[:, 0], labels, [0])[0]
    assert [torch.equal(first[0][:, block], other[:, block]) for block in range(4)] == [True, False, True, True]


def test_what_cannot_be_encoded_is_refused_by_name() -> None:
    model = tiny_model()
    clean = blocks_like(model, 1)
    for layers in ([], [2], [-3]):
        with pytest.raises(ConfigError, match="layers"):
            model.encode(clean, layers)
    with pytest.raises(ConfigError, match="clean"):
        model.encode(clean[..., :1])
    with pytest.raises(ConfigError, match="bidirectional"):
        model.encode(clean, bidirectional=True, cache=model.new_cache(1, 4))
    with pytest.raises(ConfigError, match="full"):
        model.encode(clean, cache=model.new_cache(1))
