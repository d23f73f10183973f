"""The skip-causal rule against brute force, and its executions against each other."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from acdit import attention, products
from acdit.attention import attend_clean_blocks, attend_prefix_and_own, choose_execution, skip_causal_attention
from acdit.errors import ConfigError
from acdit.mask import CLEAN, Streams, Window, dense_mask, flex_mask, may_attend


def random_streams(rng: random.Random) -> Streams:
    num_blocks = rng.randint(1, 6)
    window = Window(rng.randint(1, 4), rng.randint(0, 3)) if rng.random() < 0.5 else None
    return Streams(num_blocks - 1, num_blocks, rng.randint(1, 3), rng.randint(1, 4), window)


def mask_by_hand(streams: Streams) -> list[list[bool]]:
    """The rule in sentences, token by token, with no arithmetic shared with the code under test."""

    def in_sight(block: int, key_block: int) -> bool:
        if streams.window is None:
            return True
        return key_block in range(streams.window.sinks) or block - key_block <= streams.window.blocks

    tokens = [("clean", 0, block) for block in range(streams.num_clean) for _ in range(streams.block_tokens)]
    for copy in range(streams.copies):
        tokens += [("noisy", copy, block) for block in range(streams.num_blocks) for _ in range(streams.block_tokens)]
    rows = []
    for kind, copy, block in tokens:
        row = []
        for key_kind, key_copy, key_block in tokens:
            if kind == "clean":
                row.append(key_kind == "clean" and key_block <= block and in_sight(block, key_block))
            elif key_kind == "clean":
                row.append(key_block < block and in_sight(block, key_block))
            else:
                row.append(key_copy == copy and key_block == block)
        rows.append(row)
    return rows


def test_the_predicate_is_the_rule_on_2000_random_layouts() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        streams = random_streams(rng)
        assert dense_mask(streams).tolist() == mask_by_hand(streams), streams


def test_the_predicate_works_on_plain_integers() -> None:
    assert may_attend(0, 2, CLEAN, 1)
    assert not may_attend(0, 2, CLEAN, 2)
    assert may_attend(CLEAN, 2, CLEAN, 2)
    assert not may_attend(CLEAN, 2, 0, 2)
    assert not may_attend(0, 2, 1, 2)


def random_qkv(streams: Streams, first_query: int, rng: random.Random) -> list[torch.Tensor]:
    batch, heads, width = rng.randint(1, 3), rng.randint(1, 3), rng.choice([4, 8, 16])
    shape = (batch, streams.total, streams.block_tokens, heads, width)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return [part.requires_grad_() for part in (q[:, first_query:].clone(), k, v)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, streams: Streams) -> torch.Tensor:
    """Softmax attention with the hand-made mask."""
    mask = torch.tensor(mask_by_hand(streams))[-q.shape[1] * streams.block_tokens :]
    flat_q, flat_k, flat_v = (part.flatten(1, 2) for part in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", flat_q, flat_k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, flat_v).reshape(q.shape)


@pytest.mark.parametrize("seed", range(50))
def test_all_executions_agree_with_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    streams = random_streams(rng)
    first_query = rng.choice([0, streams.num_clean])
    q, k, v = random_qkv(streams, first_query, rng)
    expected = by_hand(q, k, v, streams)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    executions = {
        "dense": lambda: skip_causal_attention(q, k, v, streams, "dense"),
        "sdpa": lambda: skip_causal_attention(q, k, v, streams, "sdpa"),
        "sdpa on any device": lambda: attention._blockwise_rebuilt(q, k, v, streams, None),
    }
    for name, run in executions.items():
        out = run()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():  # FlexAttention has no backward on CPU
        flex = skip_causal_attention(q.detach(), k.detach(), v.detach(), streams, "flex")
    torch.testing.assert_close(flex, expected, rtol=0, atol=1e-12)


def test_the_operators_meet_torchs_own_checks() -> None:
    """Schema, fake tensors and autograd registration of the compiled form (torch.library.opcheck)."""
    streams = Streams(2, 3, 2, 4)
    q, k, v = random_qkv(streams, 0, random.Random(0))
    torch.library.opcheck(attention._blockwise_attention, (q, k, v, 2, 3, 2, 0, 0))
    torch.library.opcheck(attention._blockwise_attention, (q, k, v, 2, 3, 2, 1, 1))


def test_one_block_is_plain_attention() -> None:
    streams = Streams(0, 1, 2, 8)
    q, k, v = random_qkv(streams, 0, random.Random(0))
    plain = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (q, k, v)))
    for execution in ("sdpa", "dense"):
        out = skip_causal_attention(q, k, v, streams, execution)
        torch.testing.assert_close(out, plain.transpose(2, 3), rtol=0, atol=1e-12)


def test_blocks_of_one_token_are_token_autoregression() -> None:
    """Clean stream: the causal mask. Noisy stream: strictly earlier clean tokens and itself."""
    mask = dense_mask(Streams(5, 6, 1, 1))
    assert torch.equal(mask[:5, :5], torch.ones(5, 5).tril().bool())
    assert torch.equal(mask[5:, :5], torch.ones(6, 5).tril(-1).bool())
    assert torch.equal(mask[5:, 5:], torch.eye(6).bool())


def saved_bytes(tokens: int, length: int = 16) -> int:
    """Bytes that autograd keeps for one attention call, each storage counted once."""
    num_blocks = tokens // length
    streams = Streams(num_blocks - 1, num_blocks, 1, length)
    shape = (1, streams.total, length, 2, 8)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = skip_causal_attention(q, k, v, streams, "sdpa")
    assert out.requires_grad
    assert kept
    return sum(kept.values())


@pytest.mark.parametrize("tokens", [128, 512])
def test_what_autograd_keeps_grows_with_s_not_with_its_square(tokens: int) -> None:
    """From N = 8 on: 2N − 1 blocks are computed, so at N = 4 even a perfectly linear count grows by 15/7 > 2.1."""
    assert saved_bytes(2 * tokens) <= 2.1 * saved_bytes(tokens)


def test_the_dense_execution_keeps_more_so_the_count_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: joining prefix and own keys per block and keeping them is quadratic, and the count sees it."""

    def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *counts: int) -> tuple[torch.Tensor]:
        streams = Streams(*counts[:3], q.shape[2])
        with monkeypatch.context() as patch:
            patch.setattr(attention, "checkpoint", lambda run, *args, **_: run(*args))
            return (attention._blockwise_rebuilt(q, k, v, streams, None),)

    monkeypatch.setattr(attention, "_blockwise_attention", joined)
    assert saved_bytes(512) > 2.1 * saved_bytes(256)


def test_a_shared_prefix_equals_a_duplicated_one() -> None:
    branches, batch, length, prefix = 3, 2, 4, 8
    q, k, v = (torch.randn(branches * batch, length, 2, 8, dtype=torch.float64) for _ in range(3))
    prefix_k, prefix_v = (torch.randn(batch, prefix, 2, 8, dtype=torch.float64) for _ in range(2))
    keys = torch.cat([prefix_k.repeat(branches, 1, 1, 1), k], dim=1)
    values = torch.cat([prefix_v.repeat(branches, 1, 1, 1), v], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, keys, values)))
    with torch.no_grad():
        shared = attend_prefix_and_own(q, k, v, prefix_k, prefix_v)
    torch.testing.assert_close(shared, expected.transpose(1, 2), rtol=0, atol=1e-12)
    with_grad = attend_prefix_and_own(q.requires_grad_(), k, v, prefix_k, prefix_v)
    torch.testing.assert_close(with_grad, expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_new_clean_blocks_read_the_prefix_and_each_other_causally() -> None:
    streams = Streams(4, 5, 1, 3)
    q, k, v = random_qkv(streams, 0, random.Random(1))
    full = skip_causal_attention(q, k, v, streams, "dense")
    keys, values = k[:, :4].flatten(1, 2), v[:, :4].flatten(1, 2)
    torch.testing.assert_close(attend_clean_blocks(q[:, 2:4], keys, values), full[:, 2:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "blocks", "expected"), [(4, 256, "dense"), (4, 257, "sdpa"), (5, 2, "sdpa"), (1, 1024, "dense")]
)
def test_many_tiny_blocks_of_a_short_sequence_take_one_mask_on_a_cpu(length: int, blocks: int, expected: str) -> None:
    streams = Streams(blocks - 1, blocks, 1, length)
    assert choose_execution("auto", torch.device("cpu"), True, streams) == expected
    assert choose_execution("auto", torch.device("cuda"), True, streams) == "flex"
    assert choose_execution("sdpa", torch.device("cpu"), True, streams) == "sdpa"


def test_the_choice_is_made_by_device_overridable_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="acdit.attention"):
        assert choose_execution("auto", torch.device("cpu"), True) == "sdpa"
        assert choose_execution("auto", torch.device("cpu"), True) == "sdpa"
        assert choose_execution("auto", torch.device("cuda"), True) == "flex"
        assert choose_execution("dense", torch.device("cpu"), True) == "dense"
        assert choose_execution("flex", torch.device("cpu"), False) == "flex"
        assert choose_execution("flex", torch.device("cpu"), True) == "sdpa"
    assert len([record for record in caplog.records if "chosen for cpu" in record.message]) == 1
    assert any("no backward on cpu" in record.message for record in caplog.records)
    with pytest.raises(ConfigError, match="sdpa"):
        choose_execution("fast", torch.device("cpu"), False)


def test_block_masks_are_made_once() -> None:
    streams = Streams(1, 2, 1, 4)
    assert flex_mask(streams, 0, torch.device("cpu")) is flex_mask(streams, 0, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close_to_fp64(dtype: torch.dtype) -> None:
    streams = Streams(3, 4, 2, 16)
    q, k, v = random_qkv(streams, 0, random.Random(3))
    exact = by_hand(q, k, v, streams)
    out = skip_causal_attention(*(part.detach().to(dtype) for part in (q, k, v)), streams, "sdpa")
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("in_hardware", [True, False])
def test_bf16_gradients_stay_close_to_fp64_with_and_without_bf16_units(
    in_hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", in_hardware)
    streams = Streams(3, 4, 2, 16)
    q, k, v = random_qkv(streams, 0, random.Random(3))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in (q, k, v)]
        skip_causal_attention(*leaves, streams, "sdpa").square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for found, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() / exact.norm() < 2e-2
