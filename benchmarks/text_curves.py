"""The bound over the length of a block: from next-token prediction to full-sequence masked diffusion.

    python benchmarks/text_curves.py --data PATH/input.txt              # the same command goes on after a kill
    python benchmarks/text_curves.py --data PATH/input.txt --stage draw

One model for each block length, all of one size, on tiny Shakespeare by characters. Equal compute: each trains on the
same number of sequences with the same two streams, so steps cost the same but for attention (a block of L′ tokens
sees what lies before it and itself); sequences a second stand beside. Measured on the held-out tenth by the exact
count of masked tokens; with one token a block that is the exact likelihood. Everything lies in runs/text-curves,
figures and picture in docs/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from acdit import provenance, storage
from acdit.analysis.plots import panels
from acdit.data.build import build_dataset
from acdit.data.text import TextDataset
from acdit.demo_text import counted_bits
from acdit.evaluation.perplexity import count_characters, text_bound
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.recipe import Recipe, load_recipe
from acdit.training import Trainer
from acdit.training.history import committed_checkpoints

RECIPE = "tinyshakespeare"
BLUE = "#2a6fbb"
RESULTS = Path(__file__).parent.parent / "docs" / "results"
SMALL = [
    "model.grid=[256]", "model.num_layers=4", "model.num_attention_heads=4", "model.attention_head_dim=32",
    "optim.batch_size=16", "optim.lr=3e-3", "optim.decay_fraction=0.5", "optim.warmup_steps=50", "ema.decays=[0.99]",
    "train.log_every=20", "train.checkpoint_every=200", "train.keep_checkpoints=1", "train.sample_every=null",
    "train.tensorboard=false",
]  # fmt: skip
"""The recipe at the size of a laptop."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as train.precision=bf16")
    parser.add_argument("--data", required=True, help="tiny Shakespeare's input.txt, or any text")
    parser.add_argument("--output", type=Path, default=Path("runs/text-curves"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--stage", choices=("train", "draw", "all"), default="all")
    options = parser.parse_args()
    if options.stage in ("train", "all"):
        for seed in options.seeds:
            for block in options.blocks:
                run(block, seed, options)
        collect(options)
    draw(options)


def recipe_of(block: int, seed: int, options: argparse.Namespace, split: str = "train") -> Recipe:
    """The small recipe with blocks of this length."""
    crop = "random" if split == "train" else "center"
    return load_recipe(RECIPE, [
        *SMALL, f"data.root={options.data}", f"data.split={split}", f"data.crop={crop}", f"model.block=[{block}]",
        f"seed={seed}", f"train.steps={options.steps}", *options.overrides,
    ])  # fmt: skip


def folder_of(block: int, seed: int, options: argparse.Namespace) -> Path:
    folder: Path = options.output / f"block-{block}-seed-{seed}"
    return folder


def run(block: int, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one model, or go on."""
    folder = folder_of(block, seed, options)
    if (folder / "bound.json").is_file():
        return
    recipe = recipe_of(block, seed, options)
    started = time.perf_counter()
    if not (folder / "model").is_dir():
        Trainer(recipe, folder, resume="latest" if committed_checkpoints(folder) else None).train()
    seconds = time.perf_counter() - started
    model = ACDiTTextPipeline.from_pretrained(folder / "model").transformer
    held_out = text_of(recipe_of(block, seed, options, "held_out"))
    started = time.perf_counter()
    bound = text_bound(model, held_out.batches(32), num_draws=options.draws, copies=2, seed=seed)
    characters = count_characters(held_out.tokenizer, held_out.batches(32))
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = {
        "block": block,
        "seed": seed,
        "bits_per_character": bound.bits_per_character(characters),
        "bits_per_character_95": [end / math.log(2) for end in bound.interval],
        "bits_by_place_in_block": [nats / math.log(2) for nats in bound.by_position],
        "protocol": bound.protocol,
        "last_training_loss": steps[-1]["loss"],
        "sequences_per_second": sorted(step["samples_per_second"] for step in steps)[len(steps) // 2],
        "seconds_training": round(seconds, 1),
        "seconds_measuring": round(time.perf_counter() - started, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "characters": characters,
    }
    storage.write_json_atomic(folder / "bound.json", figures)
    print(f"block {block}, seed {seed}: {figures['bits_per_character']:.4f} bits a character, {seconds:.0f} s")


def text_of(recipe: Recipe) -> TextDataset:
    dataset = build_dataset(recipe.data)
    assert isinstance(dataset, TextDataset)
    return dataset


def collect(options: argparse.Namespace) -> None:
    """All runs into docs/results/text-curves.json."""
    first = options.blocks[0]
    train, held_out = (text_of(recipe_of(first, 0, options, split)) for split in ("train", "held_out"))
    unigram, bigram = counted_bits(train.row, held_out.row, held_out.vocab_size)
    runs: list[Any] = [
        json.loads((folder_of(block, seed, options) / "bound.json").read_text(encoding="utf-8"))
        for seed in options.seeds
        for block in options.blocks
    ]
    sizes = recipe_of(first, 0, options)
    options.results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(options.results / "text-curves.json", {
        "runs": runs, "unigram_bits_per_character": unigram, "bigram_bits_per_character": bigram,
        "steps": options.steps, "batch_size": sizes.optim.batch_size, "context": sizes.data.sequence_length,
        "training_tokens": len(train.row), "held_out_sequences": len(held_out), "draws": options.draws,
        "overrides": [*SMALL, *options.overrides], **provenance.facts(),
    })  # fmt: skip


def draw(options: argparse.Namespace) -> None:
    """Bits a character against the length of a block, and against the place in it."""
    result = json.loads((options.results / "text-curves.json").read_text(encoding="utf-8"))
    runs = result["runs"]
    blocks = sorted({one["block"] for one in runs})
    path = options.results / "text-curves.png"
    titles = ("smaller blocks come closer to autoregression", "the same by place in the block")
    with panels(path, titles, f"{result['steps']} steps of {result['batch_size']} sequences") as (left, right):
        of = {block: [one["bits_per_character"] for one in runs if one["block"] == block] for block in blocks}
        left.plot(blocks, [sum(of[block]) / len(of[block]) for block in blocks], color=BLUE, linewidth=1.5)
        for block in blocks:
            left.plot([block] * len(of[block]), of[block], "o", color=BLUE, markersize=5)
        left.axhline(result["bigram_bits_per_character"], color="#888", linestyle="--", linewidth=1, label="bigrams")
        left.set(
            xscale="log", xlabel="tokens a block, L′ (1: autoregression, the whole: masked diffusion)",
            ylabel="bits a character, held out",
        )  # fmt: skip
        left.set_xticks(blocks, [str(block) for block in blocks])
        left.minorticks_off()
        left.legend(frameon=False)
        for one in runs:
            places = one["bits_by_place_in_block"]
            if one["seed"] == runs[0]["seed"] and len(places) > 1:
                right.plot(range(1, len(places) + 1), places, label=f"L′ = {one['block']}", linewidth=1.3)
        right.set(xscale="log", xlabel="place in the block", ylabel="bits a character")
        right.legend(frameon=False, fontsize=8)
    print(f"see {options.results}/text-curves.json, text-curves.png")


if __name__ == "__main__":
    main()
