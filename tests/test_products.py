"""bf16 products on the fp32 units mean what bf16 products mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acdit import products
from acdit.products import Linear, linear
from acdit.recompute import checkpoint_elementwise
from tests.conftest import blocks_like, tiny_model

BF16_ULP = 2.0**-7


@pytest.fixture(params=[False, True], ids=["through-fp32", "as-torch-has-it"])
def in_hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, whatever processor the test runs on."""
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", request.param)
    return request.param


@pytest.fixture
def no_bf16_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", False)


def factors(rows: int = 37, inputs: int = 96, outputs: int = 53) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs)


@pytest.mark.usefixtures("in_hardware")
def test_a_product_is_the_exact_one_rounded_once() -> None:
    """Against fp64 on the same bf16 factors: half a unit in the last place of bf16, and what fp32 sums lose."""
    x, weight, bias = factors()
    bias = bias.bfloat16()
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 0.51 * BF16_ULP * exact.abs() + 1e-5).all()


def test_gradients_are_those_of_the_rounded_product(no_bf16_unit: None) -> None:
    x, weight, bias = factors()
    grad = torch.randn(2, 37, 53).bfloat16()
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.bfloat16().requires_grad_()]
    found = torch.autograd.grad(linear(*leaves), leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(F.linear(*wide), wide, grad.double())
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), true, rtol=0.51 * BF16_ULP, atol=1e-4)


def test_autocast_rounds_fp32_weights_and_leaves_their_gradients_wide(no_bf16_unit: None) -> None:
    x, weight, bias = factors()
    layer = Linear(96, 53)
    with torch.no_grad():
        layer.weight.copy_(weight.float() + 1e-4)
        layer.bias.copy_(bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.float())
    expected = F.linear(x.double(), layer.weight.detach().bfloat16().double(), layer.bias.detach().bfloat16().double())
    assert out.dtype == torch.bfloat16
    assert ((out.double() - expected).abs() <= 0.51 * BF16_ULP * expected.abs() + 1e-5).all()
    grad = torch.randn_like(out)
    out.backward(grad)
    true = torch.einsum("bro,bri->oi", grad.double(), x.double())
    torch.testing.assert_close(layer.weight.grad.double(), true, rtol=1e-5, atol=1e-4)


def test_other_types_and_places_are_torchs_own(no_bf16_unit: None) -> None:
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = (part.to(dtype) for part in factors())
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        double = torch.randn(3, 96, dtype=torch.float64)
        assert not products.through_fp32(double)  # autocast leaves fp64 alone
    with torch.autocast("cpu", torch.float16):
        assert not products.through_fp32(torch.randn(3, 96))
    assert not products.through_fp32(torch.empty(3, 96, dtype=torch.bfloat16, device="meta"))


def test_the_operator_meets_torchs_own_checks() -> None:
    x, weight, bias = factors(5, 8, 6)
    for given in (None, bias.bfloat16().requires_grad_()):
        torch.library.opcheck(torch.ops.acdit.bf16_linear.default, (x.requires_grad_(), weight.requires_grad_(), given))


def test_a_model_gives_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and every gradient of a bf16 model: the two ways are as near to each other as to fp64."""
    model = tiny_model(dtype=torch.bfloat16)
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)
    labels = torch.tensor([1, 2])

    def run(module: torch.nn.Module, *given: Tensor) -> list[Tensor]:
        module.zero_grad()
        out = module(*given, 500, labels).sample
        out.float().square().sum().backward()
        return [out.detach().double(), *(parameter.grad.double() for parameter in module.parameters())]

    wide = run(tiny_model(dtype=torch.float64).requires_grad_(), clean.double(), noisy.double())
    errors = []
    for hardware in (True, False):
        monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", hardware)
        found = run(model, clean, noisy)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, wide, strict=True)])
    for ours, torchs in zip(errors[1], errors[0], strict=True):
        assert ours <= 1.5 * torchs + 0.005


@pytest.mark.parametrize("compiled", [False, True])
def test_what_autograd_keeps_is_bf16(no_bf16_unit: None, compiled: bool) -> None:
    """The widened factors are temporary: they would double the memory of a step."""
    layer = Linear(64, 64)
    x = torch.randn(8, 64, 64, requires_grad=True)
    run = torch.compile(layer) if compiled else layer
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        run(x).float().sum().backward()
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    rows = [t for t in kept if t.numel() == x.numel() and t.data_ptr() not in own]
    assert rows
    assert all(t.dtype == torch.bfloat16 for t in rows)


def test_selective_checkpointing_keeps_the_product(no_bf16_unit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = torch.nn.functional.linear

    def counted(*given: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*given)

    monkeypatch.setattr(products.F, "linear", counted)
    layer = Linear(16, 16).bfloat16()
    checkpoint_elementwise(layer, torch.randn(4, 16).bfloat16().requires_grad_()).sum().backward()
    assert calls == 1
