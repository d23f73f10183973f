"""The transformer: sizes, its two verbs against the training forward, who sees what."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from acdit import ACDiTTransformer, BlockLayout
from acdit.errors import ConfigError
from acdit.layers import RMSNorm, TimestepEmbedder
from acdit.model import PRESETS
from acdit.recompute import checkpoint_elementwise
from acdit.rope import FORMS, base_for_extent
from tests.conftest import blocks_like, tiny_model

LAYOUTS = {
    "image": ((8, 8), (4, 4), 1),
    "patched image": ((8, 8), (2, 4), 2),
    "frames": ((4, 4, 4), (2, 4, 4), (1, 1, 1)),
    "frame parts": ((4, 8, 8), (2, 2, 2), (1, 2, 2)),
    "1-D": ((24,), (6,), 1),
    "one block": ((6, 6), (6, 6), 1),
    "one token a block": ((5,), (1,), 1),
}


def model_for(name: str, **options: object) -> ACDiTTransformer:
    grid, block, patch = LAYOUTS[name]
    head_dim = 16 if len(grid) == 3 else 8
    return tiny_model(grid, block, patch=patch, attention_head_dim=head_dim, **options)


@pytest.mark.parametrize(
    ("name", "images", "videos"),
    [
        ("B", 130_305_028, 129_633_040),
        ("L", 457_851_908, 456_955_920),
        ("XL", 674_856_708, 673_848_720),
        ("H", 950_959_620, 949_839_632),
    ],
)
def test_presets_have_the_references_parameter_counts(name: str, images: int, videos: int) -> None:
    with torch.device("meta"):
        image = ACDiTTransformer((32, 32), (16, 16), in_channels=4, num_classes=1000, **PRESETS[name])
        video = ACDiTTransformer((16, 32, 32), (4, 16, 16), (1, 2, 2), num_classes=101, **PRESETS[name])
    assert sum(p.numel() for p in image.parameters()) == images
    assert sum(p.numel() for p in video.parameters()) == videos


def test_a_new_model_predicts_zero() -> None:
    model = ACDiTTransformer((8, 8), (4, 4), num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3)
    clean = torch.randn(2, 4, 16, 4)
    assert model(clean, torch.randn_like(clean), 500, torch.tensor([0, 2])).sample.abs().max() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_denoising_equals_the_training_forward_block_by_block(name: str) -> None:
    model = model_for(name)
    copies, batch = 2, 3
    clean, noisy = blocks_like(model, batch), blocks_like(model, batch, copies)
    timestep = torch.rand(batch, copies, model.layout.num_blocks) * 999
    labels = torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = model(clean, noisy, timestep, labels).sample
        cache = model.new_cache(batch)
        for block in range(model.layout.num_blocks):
            branch_major = noisy[:, :, block].transpose(0, 1).flatten(0, 1)
            out = model.denoise(branch_major, timestep[:, :, block].T.flatten(), labels.repeat(copies), cache)
            out = out.unflatten(0, (copies, batch)).transpose(0, 1)
            torch.testing.assert_close(out, expected[:, :, block], rtol=0, atol=1e-12)
            if block + 1 < model.layout.num_blocks:
                model.prefill(clean[:, block : block + 1], cache)


@pytest.mark.parametrize("rope", FORMS)
@pytest.mark.parametrize("execution", ["sdpa", "dense"])
def test_every_rope_denoises_from_the_cache_as_in_the_forward_and_beyond_the_trained_extent(
    rope: str, execution: str
) -> None:
    """A model of 4 blocks goes on for 8; one of 8 blocks with its weights (and, at these extents, its bases) agrees."""
    small = tiny_model((4, 4), (2, 2), rope=rope)
    large = tiny_model((8, 4), (2, 2), rope=rope)
    large.load_state_dict(small.state_dict())
    large.attention_execution = execution
    clean, noisy = blocks_like(large, 2), blocks_like(large, 2)
    timestep, labels = torch.rand(2, 8) * 999, torch.tensor([1, 4])
    with torch.no_grad():
        expected = large(clean, noisy, timestep, labels).sample
        cache = small.new_cache(2, num_blocks=8)
        for block in range(8):
            out = small.denoise(noisy[:, block], timestep[:, block], labels, cache)
            torch.testing.assert_close(out, expected[:, block], rtol=0, atol=1e-12)
            small.prefill(clean[:, block : block + 1], cache)


def test_the_ropes_differ_and_without_one_places_in_a_block_are_alike() -> None:
    clean, noisy = blocks_like(tiny_model(), 1), blocks_like(tiny_model(), 1)
    swapped = noisy.clone()
    swapped[:, :, [0, 5]] = noisy[:, :, [5, 0]]
    outs = {}
    for rope in FORMS:
        model = tiny_model(rope=rope)
        with torch.no_grad():
            outs[rope], moved = (model(clean, x, 500, torch.tensor([1])).sample for x in (noisy, swapped))
        moved[:, :, [0, 5]] = moved[:, :, [5, 0]]
        same = torch.allclose(outs[rope], moved, rtol=0, atol=1e-12)
        assert same == (rope == "none")
    for one in FORMS:
        for other in FORMS:
            assert one == other or (outs[one] - outs[other]).abs().max() > 1e-6


def test_a_split_without_axes_to_split_is_refused() -> None:
    for options in ({"rope": "1d", "rope_split": (1, 1)}, {"rope": "none", "rope_split": (1,)}, {"rope": "axial2"}):
        with pytest.raises(ConfigError, match="rope"):
            tiny_model(**options)


def test_a_base_that_is_none_or_that_nothing_uses_is_refused() -> None:
    for options in (
        {"rope_base": 1.0},
        {"rope_base": -5.0},
        {"rope_base": math.inf},
        {"rope_base": 1e4, "rope": "none"},
    ):
        with pytest.raises(ConfigError, match="rope_base"):
            tiny_model(**options)


def test_the_base_of_the_rule_written_out_is_the_rule() -> None:
    ruled, given, other = (tiny_model(rope="1d", rope_base=base) for base in (None, 200.0, 10_000.0))
    assert base_for_extent(ruled.layout.num_tokens) == 200
    clean, noisy = blocks_like(ruled, 2), blocks_like(ruled, 2)
    outs = [model(clean, noisy, 500, torch.tensor([1, 2])).sample for model in (ruled, given, other)]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-6


def test_blocks_may_be_read_one_by_one_or_together() -> None:
    model = model_for("image")
    clean = blocks_like(model, 2)
    step_by_step, at_once = model.new_cache(2), model.new_cache(2)
    for block in range(3):
        model.prefill(clean[:, block : block + 1], step_by_step)
    model.prefill(clean[:, :1], at_once)
    model.prefill(clean[:, 1:3], at_once)
    for layer in range(at_once.num_layers):
        for one, other in zip(step_by_step.prefix(layer), at_once.prefix(layer), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("execution", ["sdpa", "dense", "flex"])
def test_every_noisy_copy_is_as_if_alone(execution: str) -> None:
    model = model_for("image")
    model.attention_execution = execution
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2, 3)
    timestep, labels = torch.rand(2, 3, 4) * 999, torch.tensor([1, 2])
    with torch.no_grad():
        together = model(clean, noisy, timestep, labels).sample
        for copy in range(3):
            alone = model(clean, noisy[:, copy], timestep[:, copy], labels).sample
            torch.testing.assert_close(together[:, copy], alone, rtol=0, atol=1e-12)


def changed_blocks(model: ACDiTTransformer, before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return [b for b in range(model.layout.num_blocks) if (before[:, b] - after[:, b]).abs().max() > 1e-9]


@pytest.mark.parametrize("name", ["image", "frames", "one token a block"])
def test_who_sees_what(name: str) -> None:
    """Noisy block i changes prediction i only; clean block i changes predictions after i only."""
    model = model_for(name)
    clean, noisy = blocks_like(model, 1), blocks_like(model, 1)
    with torch.no_grad():
        before = model(clean, noisy, 500, torch.tensor([1])).sample
        for block in range(model.layout.num_blocks):
            other = noisy.clone()
            other[:, block] += 1
            assert changed_blocks(model, before, model(clean, other, 500, torch.tensor([1])).sample) == [block]
            context = clean.clone()
            context[:, block] += 1
            later = list(range(block + 1, model.layout.num_blocks))
            assert changed_blocks(model, before, model(context, noisy, 500, torch.tensor([1])).sample) == later


def test_a_blocks_timestep_changes_its_own_prediction_only() -> None:
    model = model_for("image")
    clean, noisy = blocks_like(model, 1), blocks_like(model, 1)
    timestep = torch.full((1, 4), 500.0)
    with torch.no_grad():
        before = model(clean, noisy, timestep, None).sample
        timestep[0, 2] = 10
        assert changed_blocks(model, before, model(clean, noisy, timestep, None).sample) == [2]
        per_block_labels = torch.tensor([[5, 5, 1, 5]])
        timestep[0, 2] = 500
        assert changed_blocks(model, before, model(clean, noisy, timestep, per_block_labels).sample) == [2]


def test_the_clean_stream_never_sees_timestep_or_label() -> None:
    """Its keys and values are made without either, and equal those of a model with other adaLN weights."""
    model = model_for("image")
    clean = blocks_like(model, 1)
    caches = [model.new_cache(1), model.new_cache(1)]
    model.prefill(clean[:, :3], caches[0])
    with torch.no_grad():
        for layer in model.layers:
            layer.modulation[1].weight.normal_()
        model.t_embedder.mlp[0].weight.normal_()
        model.y_embedder.weight.normal_()
    model.prefill(clean[:, :3], caches[1])
    for index in range(caches[0].num_layers):
        for one, other in zip(caches[0].prefix(index), caches[1].prefix(index), strict=True):
            assert torch.equal(one, other)


def test_gradients_reach_every_parameter() -> None:
    model = model_for("image")
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)
    model(clean, noisy, torch.rand(2, 4) * 999, torch.tensor([0, 5])).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def bytes_held(forward: Callable[[], torch.Tensor]) -> int:
    """What a forward keeps allocated for its backward, from the allocator's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = forward()
    del kept
    events = recorded.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("how", "share"), [("elementwise", 0.55), ("layers", 0.1)])
def test_gradient_checkpointing_changes_memory_and_nothing_else(how: str, share: float, compiled: bool) -> None:
    model = tiny_model((32, 32), (16, 16), num_layers=6, num_attention_heads=4, attention_head_dim=8)
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)
    # What a graph keeps is decided by the partitioner; generating code for it would take minutes and decide nothing.
    run = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model

    def loss() -> torch.Tensor:
        return run(clean, noisy, 300, torch.tensor([0, 5])).sample.square().sum()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss().backward()
        return [p.grad.clone() for p in model.parameters()]

    # A compiled graph chooses by itself what it keeps: there, eager mode is the measure too.
    plain = gradients()
    plain_bytes = bytes_held(lambda: model(clean, noisy, 300, torch.tensor([0, 5])).sample.square().sum())
    model.enable_gradient_checkpointing(*[checkpoint_elementwise] * (how == "elementwise"))
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * compiled)
    # Of 22 activations a token, 11 are products and one is the layer's input.
    held = bytes_held(loss)
    assert held < share * plain_bytes


def test_the_last_clean_block_is_not_computed() -> None:
    model = model_for("image")
    seen: list[int] = []
    model.x_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    clean, noisy = blocks_like(model, 1), blocks_like(model, 1)
    before = model(clean, noisy, 500).sample
    assert seen == [2 * 4 - 1]
    clean[:, -1] = float("nan")
    assert torch.equal(model(clean, noisy, 500).sample, before)


def test_the_last_layer_computes_only_keys_and_values_of_clean_tokens() -> None:
    model = model_for("image")
    seen: list[int] = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(blocks_like(model, 1), blocks_like(model, 1), 500)
    assert seen == [7, 4]


def test_adaln_is_computed_once_a_block_not_once_a_token() -> None:
    model = model_for("image")
    seen: list[torch.Size] = []
    model.layers[0].modulation.register_forward_hook(lambda _, inputs, out: seen.append(out.shape))
    model(blocks_like(model, 2), blocks_like(model, 2, 3), torch.rand(2, 3, 4))
    assert seen == [(2, 12, 6 * 16)]


def test_unconditional_models_have_no_label_embedding() -> None:
    model = model_for("image", num_classes=None)
    clean = blocks_like(model, 1)
    assert model.null_label is None
    assert model.y_embedder is None
    assert model(clean, clean, 10).sample.shape == clean.shape
    with pytest.raises(ConfigError, match="unconditional"):
        model(clean, clean, 10, torch.tensor([1]))


def test_no_label_is_the_null_label() -> None:
    model = model_for("image")
    clean = blocks_like(model, 2)
    null = torch.full((2,), model.null_label)
    assert torch.equal(model(clean, clean, 10).sample, model(clean, clean, 10, null).sample)


def test_norms_and_timesteps_are_computed_wide() -> None:
    norm = RMSNorm(64)
    x = torch.randn(4, 64).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
    assert torch.equal(norm(x), exact.float().bfloat16())
    embedder = TimestepEmbedder(32).bfloat16()
    torch.nn.init.normal_(embedder.mlp[0].weight)
    torch.nn.init.normal_(embedder.mlp[2].weight)
    # 999 and 998 are the same number in bf16.
    assert not torch.equal(embedder(torch.tensor([999.0])), embedder(torch.tensor([998.0])))


@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_written_out_norm_equals_torchs(width: int) -> None:
    x = torch.randn(3, 5, width, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(width).double()
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.rms_norm(x, (width,), norm.weight, norm.eps)
    out, upstream = norm(x), torch.randn(3, 5, width, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    grads = torch.autograd.grad(out, (x, norm.weight), upstream)
    expected_grads = torch.autograd.grad(expected, (x, norm.weight), upstream)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_bf16_weights_and_autocast_stay_close() -> None:
    model = tiny_model(dtype=torch.float32)
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)
    with torch.no_grad():
        exact = model(clean, noisy, 700).sample
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(clean, noisy, 700).sample.float()
        low = model.bfloat16()(clean.bfloat16(), noisy.bfloat16(), 700).sample.float()
    assert (cast - exact).norm() / exact.norm() < 3e-2
    assert (low - exact).norm() / exact.norm() < 3e-2


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    model = tiny_model((4, 8, 8), (2, 2, 2), patch=(1, 2, 2), dtype=torch.float32, rope="reference")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = ACDiTTransformer.from_pretrained(tmp_path)
    assert loaded.layout == BlockLayout((4, 8, 8), (2, 2, 2), (1, 2, 2))
    clean = blocks_like(model, 1)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(clean, clean, 30).sample, model(clean, clean, 30).sample)


def test_wrong_shapes_are_named() -> None:
    model = tiny_model()
    clean = blocks_like(model, 2)
    with pytest.raises(ConfigError, match="to_blocks"):
        model(clean[:, :3], clean, 10)
    with pytest.raises(ConfigError, match="noisy copies"):
        model(clean, clean[..., :1], 10)
    with pytest.raises(ConfigError, match="batch"):
        model(clean, clean[:1], 10)
    with pytest.raises(ConfigError, match="multiple of the cache"):
        model.denoise(clean[:1, 0], 10, None, model.new_cache(2))
    with pytest.raises(ConfigError, match="timestep"):
        model(clean, clean, torch.zeros(2, 1, 4, 1))


def test_compiled_verbs_have_no_graph_breaks_and_at_most_three_graphs() -> None:
    """N = 16, the cache growing: its length is a dynamic size."""
    model = tiny_model((16, 16), (4, 4), dtype=torch.float32)
    graphs = {"prefill": 0, "denoise": 0}

    def counting(name: str) -> object:
        def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
            graphs[name] += 1
            return graph.forward

        return backend

    torch._dynamo.reset()
    counters.clear()
    prefill = torch.compile(model.prefill, fullgraph=True, backend=counting("prefill"))
    denoise = torch.compile(model.denoise, fullgraph=True, backend=counting("denoise"))
    clean, labels = blocks_like(model, 2), torch.tensor([1, 2, 5, 5])
    compiled_cache, eager_cache = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        for block in range(16):
            noisy = clean[:, block].repeat(2, 1, 1) + 1
            for timestep in (torch.tensor(900), torch.tensor(30)):
                fast = denoise(noisy, timestep, labels, compiled_cache)
                torch.testing.assert_close(fast, model.denoise(noisy, timestep, labels, eager_cache))
            if block < 15:
                prefill(clean[:, block : block + 1], compiled_cache)
                model.prefill(clean[:, block : block + 1], eager_cache)
    assert not counters["graph_break"]
    assert max(graphs.values()) <= 3, graphs


def test_the_compiled_forward_has_no_graph_break() -> None:
    model = tiny_model()
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    timestep, labels = torch.rand(2, 2, 4) * 999, torch.tensor([1, 2])
    model(clean, noisy, timestep, labels).sample.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(clean, noisy, timestep, labels).sample.square().sum().backward()
    for one, other in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one)


def test_a_timestep_a_sample_is_not_taken_for_one_a_block() -> None:
    model = tiny_model()
    clean, noisy = blocks_like(model, 2), blocks_like(model, 2)
    with pytest.raises(ConfigError, match="timestep"):
        model(clean, noisy, torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ConfigError, match="timestep"):
        model(clean, noisy, torch.zeros(3, 4))
    per_sample = model(clean, noisy, torch.tensor([100, 900])).sample
    per_block = model(clean, noisy, torch.tensor([[100], [900]])).sample
    assert torch.equal(per_sample, per_block)
