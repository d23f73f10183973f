"""Every recipe that comes with the package: it parses, its model is the paper's, its head says how it is started."""

from __future__ import annotations

import dataclasses
import re
import shlex
from importlib import resources

import pytest
import torch

from acdit import costs
from acdit.data.build import require_used
from acdit.model import ACDiTTransformer
from acdit.recipe import Recipe, difference, load_recipe, recipe_from_dict, recipe_to_yaml, shipped_recipes
from acdit.rope import base_for_extent
from acdit.strict_yaml import read_yaml
from acdit.training.build import architecture, build_model

COUNTS = {"b": 130_305_028, "l": 457_851_908, "xl": 674_856_708, "h": 950_959_620}
"""The reference's exact parameters of image models: 1,000 classes, tokens of 4 numbers."""
VIDEO_COUNTS = {"xl": 673_848_720, "h": 949_839_632}
"""The same of video models: 101 classes, tokens of 16 numbers."""
FVD = {"xl": "111", "h": "104"}
FID = {"imagenet256-l": "2.53", "imagenet256-xl": "2.45", "imagenet256-h": "2.37"}
"""The paper's Table 1."""
LARGE = [name for name in shipped_recipes() if name.startswith("imagenet")]
VIDEO = ["ucf101-xl", "ucf101-h"]
OPENWEBTEXT = [f"openwebtext-{kind}" for kind in ("4", "8", "16", "128", "256", "mdlm", "ar", "8-rope10000")]
FINETUNE = ["finetune-digits", "finetune-mnist", "finetune-imagenet256-xl"]
VOCABULARY = {"characters": 65, "gpt2": 50_257}
EIGHT_GPUS = [*LARGE, *VIDEO, *OPENWEBTEXT, "finetune-imagenet256-xl"]
PERPLEXITY = {"8": "21.59", "128": "22.82", "256": "22.98"}
"""The paper's Table 4."""


def head_of(name: str) -> str:
    """The comment on top, with its lines joined."""
    text = resources.files("acdit").joinpath("recipes", f"{name}.yaml").read_text("utf-8")
    lines = [line for line in text.split("\nname:")[0].splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def model_of(recipe: Recipe) -> ACDiTTransformer:
    vocab_size = VOCABULARY[recipe.data.tokenizer] if recipe.corruption.kind == "masking" else None
    with torch.device("meta"):
        return build_model(dataclasses.replace(recipe.model, vocab_size=vocab_size))


def test_the_papers_runs_baselines_and_ablations_are_all_there() -> None:
    sizes = {f"imagenet{kind}-{size}" for kind in ("256", "512", "256-oneblock") for size in COUNTS}
    ablations = {f"imagenet256-b-{kind}" for kind in ("norope", "rope1d", "noisycontext")}
    assert set(LARGE) == sizes | ablations | {"imagenet256-h-long"}
    assert set(shipped_recipes()) - set(LARGE) >= {
        "digits",
        "mnist",
        "cifar10",
        "moving-digits",
        "moving-digits-first",
        "moving-mnist",
        *VIDEO,
        "text",
        "tinyshakespeare",
        "wikitext2",
        *OPENWEBTEXT,
        *FINETUNE,
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_read_whole_and_its_head_starts_it(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_from_dict(read_yaml(recipe_to_yaml(recipe), name)) == recipe
    text = resources.files("acdit").joinpath("recipes", f"{name}.yaml").read_text("utf-8")
    command = shlex.split(text.splitlines()[0].removeprefix("# ").split("  ")[0])
    if name == "digits":
        assert command == ["acdit", "demo"]
        return
    launcher = "torchrun --nproc-per-node 8 -m acdit.cli" if name in EIGHT_GPUS else "acdit"
    assert command[: len(launcher.split())] == launcher.split()
    verb, started, *rest = command[len(launcher.split()) :]
    tuned = name in FINETUNE
    assert (verb, started, rest[-2:]) == ("finetune" if tuned else "train", name, ["--output", f"runs/{name}"])
    assert (recipe.classification is not None) == tuned == any(word.startswith("model=") for word in rest)
    load_recipe(name, [word for word in rest if "=" in word and not word.startswith("model=")])


@pytest.mark.parametrize("name", FINETUNE)
def test_a_finetuning_recipe_starts_from_the_model_it_names(name: str) -> None:
    """Its model section is that of the recipe whose model its head hands over."""
    recipe = load_recipe(name)
    base = load_recipe({"finetune-mnist": "mnist-patch4"}.get(name, name.removeprefix("finetune-")))
    assert recipe.model == base.model
    assert recipe.corruption.prediction_type == base.corruption.prediction_type
    require_used(recipe.data)
    assert recipe.classification is not None
    assert recipe.classification.tune == "all"


def test_the_papers_finetuning_says_what_is_the_papers_and_what_is_ours() -> None:
    recipe, head = load_recipe("finetune-imagenet256-xl"), head_of("finetune-imagenet256-xl")
    assert (recipe.train.epochs, recipe.data.kind) == (100, "latents")
    assert "other setting of the optimizer, the averages and the head is ours" in head
    assert "top-1 84.0 (DiT-XL 82.8)" in head


@pytest.mark.parametrize("name", LARGE)
def test_an_imagenet_recipe_is_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    size = re.search(r"-(b|l|xl|h)(-|$)", name)[1]
    model = model_of(recipe)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[size]
    assert model.x_embedder.weight.is_meta
    side = 64 if "512" in name else 32
    layout = model.layout
    assert layout.num_tokens == side**2
    assert layout.num_blocks == (1 if "oneblock" in name else 4)
    assert layout.block == ((side, side) if "oneblock" in name else (side // 2, side // 2))
    optim, train, corruption = recipe.optim, recipe.train, recipe.corruption
    assert (optim.batch_size, optim.lr, optim.weight_decay) == (1024, 3e-4, 0.0)
    assert (optim.betas, optim.max_grad_norm, optim.warmup_steps) == ([0.9, 0.95], 1.0, 0)
    assert (optim.schedule, optim.decay_fraction, optim.label_dropout) == ("wsd", 0.15, 0.1)
    assert recipe.ema.decays == [0.9999]
    assert (corruption.prediction_type, corruption.beta_schedule, corruption.num_train_timesteps) == (
        "epsilon", "linear", 1000,
    )  # fmt: skip
    assert (recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale) == (25, 1.5)
    if name.startswith(("imagenet256-b-", "imagenet256-h-long")):
        assert train.steps == (2_400_000 if "long" in name else 400_000)
    else:
        assert train.steps == 1_200_000
    assert (recipe.data.kind, recipe.codec.kind, recipe.codec.scaling_factor) == ("latents", "vae", 0.18215)


@pytest.mark.parametrize("size", VIDEO_COUNTS)
def test_a_ucf101_recipe_is_the_papers(size: str) -> None:
    recipe = load_recipe(f"ucf101-{size}")
    model = model_of(recipe)
    assert sum(parameter.numel() for parameter in model.parameters()) == VIDEO_COUNTS[size]
    layout = model.layout
    assert (layout.grid, layout.num_tokens, layout.num_blocks) == ((16, 32, 32), 4096, 4)
    assert (layout.block_tokens, layout.block_grid) == (1024, (4, 1, 1))  # whole frames
    assert layout.token_dim(recipe.model.in_channels) == 16
    optim = recipe.optim
    assert (optim.batch_size, optim.lr, optim.weight_decay, optim.schedule) == (96, 3e-4, 0.0, "wsd")
    assert (optim.decay_fraction, recipe.ema.decays, recipe.train.steps) == (0.15, [0.9999], 400_000)
    assert recipe.corruption == load_recipe("imagenet256-xl").corruption
    assert (recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale) == (25, 2.5)
    data = recipe.data
    assert (data.kind, data.frames, data.frame_stride, data.size, data.channels) == ("clips", 16, 1, 256, 3)
    assert (recipe.codec.kind, recipe.codec.scaling_factor) == ("vae", 0.18215)
    head = head_of(f"ucf101-{size}")
    assert f"FVD {FVD[size]} " in head
    assert "the paper's figure, not measured here" in head


@pytest.mark.parametrize("name", VIDEO)
def test_the_encode_command_in_a_head_makes_latents_that_fit_the_recipe(name: str) -> None:
    from acdit.cli import _parsed

    command, overrides = re.search(
        r"(acdit encode .*? --output \S+) .*?(data\.kind=latents \S+)", head_of(name)
    ).groups()
    options = _parsed(shlex.split(command)[1:])
    recipe = load_recipe(name, overrides.split())
    assert options.output == recipe.data.root
    assert (options.kind, options.size, options.frames) == ("clips", recipe.data.size, recipe.model.grid[0])
    assert recipe.model.grid[1:] == [options.size // 8] * 2
    require_used(recipe.data)


@pytest.mark.parametrize("name", [*LARGE, *VIDEO])
def test_it_fits_eight_cards_of_80_gb_by_the_closed_form(name: str) -> None:
    recipe = load_recipe(name)
    micro_batch = recipe.optim.batch_size // 8 // recipe.optim.accumulation
    plan = costs.training_memory(
        architecture(recipe.model), micro_batch, recipe.corruption.copies, devices=8,
        checkpointing=recipe.train.gradient_checkpointing, precision=recipe.train.precision,
        accumulation=recipe.optim.accumulation,
    )  # fmt: skip
    assert plan.total < 0.9 * 80e9


def test_expected_figures_are_the_papers_and_said_to_be() -> None:
    for name in LARGE:
        head = head_of(name)
        if name in FID:
            assert f"FID-50K {FID[name]}" in head
            assert "the paper's figure, not measured here" in head
        else:
            assert "FID-50K" not in head
        if re.search("-b-", name):
            assert "not measured here: a worse FID" in head


def test_an_ablation_changes_what_it_is_named_after_and_its_length() -> None:
    base = load_recipe("imagenet256-b")
    changed = {
        name: set(difference(base, load_recipe(f"imagenet256-b-{name}"))) - {"name", "train.steps"}
        for name in ("norope", "rope1d", "noisycontext")
    }
    assert changed == {"norope": {"model.rope"}, "rope1d": {"model.rope"}, "noisycontext": {"corruption.context_noise"}}
    assert load_recipe("imagenet256-b-noisycontext").corruption.context_noise == 1.0
    baseline = difference(load_recipe("imagenet256-xl"), load_recipe("imagenet256-oneblock-xl"))
    assert set(baseline) <= {"name", "model.block", "optim.accumulation"}


@pytest.mark.parametrize(
    ("name", "tokens", "blocks", "parameters"),
    [
        ("mnist", 196, 4, 724_868),
        ("cifar10", 256, 4, 726_412),
        ("moving-digits", 16, 4, 5076368),
        ("moving-digits-first", 4, 1, 5076368),
        ("moving-mnist", 1280, 5, 9_769_280),
        ("text", 128, 16, 1_288_001),
        ("tinyshakespeare", 256, 16, 16_558_145),
        ("wikitext2", 256, 16, 55_155_793),
    ],
)
def test_the_small_recipes_are_of_the_size_they_say(name: str, tokens: int, blocks: int, parameters: int) -> None:
    model = model_of(load_recipe(name))
    assert (model.layout.num_tokens, model.layout.num_blocks) == (tokens, blocks)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", OPENWEBTEXT)
def test_openwebtext_is_trained_and_measured_as_the_peers_do(name: str) -> None:
    recipe = load_recipe(name)
    model = model_of(recipe)
    kind = name.removeprefix("openwebtext-").removesuffix("-rope10000")
    length = {"ar": 1, "mdlm": 1024}.get(kind) or int(kind)
    assert (model.layout.block_tokens, model.layout.num_tokens) == (length, 1024)
    assert (len(model.layers), model.config.num_attention_heads, model.config.attention_head_dim) == (12, 12, 64)
    assert not model.config.time_conditioning
    optim = recipe.optim
    assert (optim.batch_size, optim.lr, optim.betas, optim.weight_decay) == (512, 3e-4, [0.9, 0.999], 0)
    assert (optim.schedule, optim.warmup_steps, optim.max_grad_norm) == ("constant", 2500, 1.0)
    assert (recipe.train.steps, recipe.train.precision, recipe.ema.decays) == (1_000_000, "bf16", [0.9999])
    assert recipe.data.held_out == 100_000
    assert recipe.corruption.mask_draw == "rate"
    # The paper does without BD3-LMs' search; its own block lengths are 8, 128 and 256.
    assert (recipe.corruption.range_search_every is not None) == (kind in ("4", "16"))
    require_used(recipe.data)
    head = head_of(name)
    assert f"acdit evaluate runs/{name}/model data.split=held_out" in head
    if name.removeprefix("openwebtext-") in PERPLEXITY:
        assert f"≤ {PERPLEXITY[kind]} (the paper's figure, not measured here)" in head
    else:
        assert "not measured here" in head.lower()


def test_the_ablation_of_ropes_base_changes_nothing_else() -> None:
    base, ablation = load_recipe("openwebtext-8"), load_recipe("openwebtext-8-rope10000")
    assert set(difference(base, ablation)) == {"name", "model.rope_base"}
    assert base_for_extent(1024) == 2700 != ablation.model.rope_base
