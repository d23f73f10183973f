"""KVCache: memory, room, forking."""

from __future__ import annotations

import pytest
import torch

from acdit import KVCache
from acdit.errors import ConfigError
from tests.conftest import blocks_like, tiny_model


def test_one_cache_for_both_guidance_branches_takes_half_the_memory() -> None:
    """ACDiT-XL, 1024 tokens in 4 blocks, bf16: 28 layers × 2 × 768 tokens × 1152 × 2 bytes = 99 MB a sample."""
    options = {"num_layers": 28, "max_tokens": 768, "num_heads": 18, "head_dim": 64, "block_tokens": 256}
    shared = KVCache(batch_size=1, dtype=torch.bfloat16, device="meta", **options)
    duplicated = KVCache(batch_size=2, dtype=torch.bfloat16, device="meta", **options)
    assert shared.nbytes == 28 * 2 * 768 * 1152 * 2 == 99_090_432
    assert duplicated.nbytes == 2 * shared.nbytes


def test_a_full_cache_says_so_and_stays_as_it_was() -> None:
    model = tiny_model()
    cache = model.new_cache(1, num_blocks=1)
    clean = blocks_like(model, 1)
    model.prefill(clean[:, :1], cache)
    with pytest.raises(ConfigError, match="KVCache is full"):
        model.prefill(clean[:, 1:2], cache)
    assert cache.num_blocks == 1


def test_forks_share_the_past_and_not_the_future() -> None:
    model = tiny_model()
    clean, noisy = blocks_like(model, 2), blocks_like(model, 6)
    parent = model.new_cache(2)
    model.prefill(clean[:, :1], parent)
    child = parent.fork(3)
    assert child.num_blocks == 1
    alone = model.denoise(noisy[:2, 1], 500, None, parent)
    together = model.denoise(noisy[[0, 0, 0, 1, 1, 1], 1], 500, None, child)
    torch.testing.assert_close(together[[0, 3]], alone, rtol=0, atol=1e-12)
    model.prefill(noisy[:, 1:2], child)
    assert parent.num_blocks == 1
    torch.testing.assert_close(model.denoise(noisy[:2, 1], 500, None, parent), alone, rtol=0, atol=0)


def test_denoising_does_not_touch_the_cache() -> None:
    model = tiny_model()
    cache = model.new_cache(1)
    clean = blocks_like(model, 1)
    model.prefill(clean[:, :2], cache)
    before = [part.clone() for layer in range(cache.num_layers) for part in cache.prefix(layer)]
    model.denoise(clean[:, 2] + 1, 300, torch.tensor([1]), cache)
    after = [part for layer in range(cache.num_layers) for part in cache.prefix(layer)]
    assert cache.num_blocks == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_heads_tokens_lie_side_by_side() -> None:
    """Attention reads the prefix head by head: tokens H·K numbers apart cost a fifth of a step at long prefixes."""
    cache = KVCache(num_layers=1, batch_size=2, max_tokens=8, num_heads=3, head_dim=4, block_tokens=4)
    keys, values = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 4)
    cache.write(0, keys, values)
    cache.advance(4)
    for held, given in zip(cache.prefix(0), (keys, values), strict=True):
        assert torch.equal(held, given)
        assert held.stride()[1:] == (4, 8 * 4, 1)
    assert all(torch.equal(held[1], keys[0]) for held in cache.fork(2).prefix(0)[:1])


@pytest.mark.parametrize("sinks", [None, 0, 1])
def test_keep_lets_the_other_samples_go(sinks: int | None) -> None:
    """Here and in all that follows, under a window too: as if they had never been there."""
    window = {} if sinks is None else {"window": 2, "sink_blocks": sinks}
    model = tiny_model(grid=(14, 4), block=(2, 4), **window, **({"sink_positions": "sliding"} if sinks else {}))
    cache, alone = model.new_cache(3), model.new_cache(2)
    blocks, noisy = blocks_like(model, 3), blocks_like(model, 3)
    size = cache.nbytes
    for block in range(6):
        rows = [0, 1, 2] if block < 5 else [2, 0]
        model.prefill(blocks[rows, block, None], cache)
        model.prefill(blocks[[2, 0], block, None], alone)
        if block == 4:
            model.denoise(noisy[:, 5], 400, None, cache)  # turns the sinks
            cache.keep([2, 0])
    assert (cache.nbytes, cache.batch_size, cache.num_blocks) == (size * 2 // 3, 2, 6)
    for layer in range(len(model.layers)):
        for ours, theirs in zip(cache.prefix(layer), alone.prefix(layer), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
            assert ours.stride() == theirs.stride()  # a head's tokens still lie side by side
    ours, theirs = (model.denoise(noisy[[2, 0], 6], 400, None, held) for held in (cache, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for wrong in ([], [2], [-1], [0, 0]):
        with pytest.raises(ConfigError, match="samples"):
            cache.keep(wrong)
