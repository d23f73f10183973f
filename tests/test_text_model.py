"""The transformer over token ids: the same streams and cache, other ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from acdit import ACDiTTransformer, BlockLayout
from acdit.costs import Architecture
from acdit.errors import ConfigError
from acdit.sampling import sample_blocks
from tests.conftest import tiny_model
from tests.texts import VOCAB, text_model


def tokens_like(model: ACDiTTransformer, *shape: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (*shape, model.layout.num_blocks, model.layout.block_tokens))


def test_a_layout_cuts_text_without_channels() -> None:
    layout = BlockLayout(6, 2)
    text = torch.arange(12).reshape(2, 6)
    blocks = layout.to_blocks(text)
    assert blocks.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert torch.equal(layout.from_blocks(blocks), text)
    assert blocks.dtype == torch.int64


@pytest.mark.parametrize(
    "options", [{}, {"window": 1}, {"window": 1, "sink_blocks": 1, "sink_positions": "sliding"}, {"rope": "1d"}]
)
@pytest.mark.parametrize("block", [1, 2, 8])
def test_the_cache_gives_what_the_training_forward_gives(block: int, options: dict[str, object]) -> None:
    model = text_model(8, block, **options)
    clean, noisy = tokens_like(model, 2), tokens_like(model, 2)
    noisy[torch.rand(noisy.shape) < 0.5] = model.mask_token
    with torch.no_grad():
        whole = model(clean, noisy, 0.0).sample
        cache = model.new_cache(2)
        for index in range(model.layout.num_blocks):
            alone = model.denoise(noisy[:, index], 0.0, None, cache)
            torch.testing.assert_close(alone, whole[:, index], rtol=0, atol=1e-10)
            if index + 1 < model.layout.num_blocks:
                model.prefill(clean[:, index : index + 1], cache)
    assert whole.shape == (*noisy.shape, VOCAB)


def test_copies_share_the_clean_pass() -> None:
    model = text_model(6, 2)
    clean, noisy = tokens_like(model, 2), tokens_like(model, 2, 3)
    with torch.no_grad():
        together = model(clean, noisy, 0.0).sample
        for copy in range(3):
            torch.testing.assert_close(together[:, copy], model(clean, noisy[:, copy], 0.0).sample, rtol=0, atol=1e-10)
    assert together.shape == (2, 3, 3, 2, VOCAB)


def test_a_block_sees_the_blocks_before_it_and_no_other() -> None:
    model = text_model(6, 2)
    clean, noisy = tokens_like(model, 1), tokens_like(model, 1)
    with torch.no_grad():
        before = model(clean, noisy, 0.0).sample
        for changed in range(3):
            other = clean.clone()
            other[:, changed] = (other[:, changed] + 1) % VOCAB
            moved = (model(other, noisy, 0.0).sample != before).any(-1).any(-1)[0].tolist()
            assert moved == [block > changed for block in range(3)]


def test_time_is_told_only_where_it_is_asked_for() -> None:
    model = text_model(6, 2)
    clean, noisy = tokens_like(model, 1), tokens_like(model, 1)
    told = text_model(6, 2, time_conditioning=True)
    told.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent = [model(clean, noisy, t).sample for t in (0.0, 500.0, torch.full((1, 3), 700.0))]
        heard = [told(clean, noisy, t).sample for t in (0.0, 500.0)]
    assert torch.equal(silent[0], silent[1])
    assert torch.equal(silent[0], silent[2])
    # Fed with zero. One vector for all blocks and many equal ones are rounded by different kernels.
    torch.testing.assert_close(silent[0], heard[0], rtol=0, atol=1e-12)
    assert not torch.equal(heard[0], heard[1])


def test_the_one_vector_that_all_blocks_share_is_computed_once() -> None:
    """And gives the gradients of one computed for each block."""
    model, told = (text_model(8, 2, time_conditioning=told).train() for told in (False, True))
    told.load_state_dict(model.state_dict())
    clean, noisy = tokens_like(model, 3), tokens_like(model, 3)
    rows = []
    model.layers[0].modulation.register_forward_hook(lambda _, given, out: rows.append(given[0].shape[:-1].numel()))
    for one in (model, told):
        one(clean, noisy, 0.0).sample.square().sum().backward()
    assert rows == [1]
    for mine, theirs in zip(model.parameters(), told.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_saved_model_comes_back_and_old_configurations_load(tmp_path: Path) -> None:
    model = text_model(6, 2)
    model.save_pretrained(tmp_path / "text")
    again = ACDiTTransformer.from_pretrained(tmp_path / "text", torch_dtype=torch.float64)
    assert again.mask_token == VOCAB
    assert again.config.time_conditioning is False
    clean = tokens_like(model, 1)
    with torch.no_grad():
        torch.testing.assert_close(again(clean, clean, 0.0).sample, model(clean, clean, 0.0).sample, rtol=0, atol=1e-12)
    old = {k: v for k, v in tiny_model().config.items() if k not in ("vocab_size", "time_conditioning")}
    former = ACDiTTransformer.from_config(old)
    assert former.mask_token is None
    assert former.config.time_conditioning is True
    assert {name for name, _ in former.named_parameters()} == {name for name, _ in tiny_model().named_parameters()}


def test_a_fresh_model_predicts_evenly_and_its_cost_is_known() -> None:
    model = ACDiTTransformer((6,), (2,), num_layers=2, num_attention_heads=2, attention_head_dim=16, vocab_size=11)
    assert model(torch.zeros(1, 3, 2).long(), torch.full((1, 3, 2), 11), 1.0).sample.eq(0).all()
    assert 0.01 < float(model.x_embedder.weight.detach().std()) < 0.03
    assert Architecture.of(model.config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_does_not_fit_is_refused() -> None:
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    for options, name in (
        ({"patch": 2, "vocab_size": 3}, "patch"),
        ({"in_channels": 1, "vocab_size": 3}, "in_channels"),
        ({"vocab_size": 0}, "vocab_size"),
    ):
        with pytest.raises(ConfigError, match=name):
            ACDiTTransformer((4,), (2,), **sizes, **options)
    model = text_model(6, 2)
    with pytest.raises(ConfigError, match="token ids"):
        model(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), 0.0)
    with pytest.raises(ConfigError, match="noisy"):
        model.denoise(torch.zeros(1, 3).long(), 0.0, None, model.new_cache(1))
    with pytest.raises(ConfigError, match="sample_tokens"):
        next(sample_blocks(model, DDIMScheduler()))
