"""The text demo: train by blocks and token by token on the built-in text, measure both honestly, write.

Both models are of one recipe, one size, one number of steps; only the block's length differs. What they are held
against is counted: characters by themselves, and pairs of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acdit import provenance, storage
from acdit.data.build import as_measured, build_dataset
from acdit.data.text import TextDataset
from acdit.demo import clear_folder
from acdit.draws import first_sample_seed
from acdit.evaluation.perplexity import TextBound, count_characters, text_bound
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.recipe import Recipe, load_recipe, recipe_to_yaml
from acdit.training import Trainer

RECIPE = "text"
RUN_NAME = "text-demo"

_BATCH = 64
_SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Counts that are added to each pair's; the one that serves the held-out text best is taken, in their favour."""
_PROTOCOL = (
    "Held-out text: the last tenth, {sequences} sequences of {context} characters, each measured without the ones "
    "before it. bits_per_char: upper bound (exact number of masked characters, {draws} draws); ar_bits_per_char: "
    "exact. Both models have the same parameters, steps, sequences and clean context; the baseline's block is one "
    "token. Unigrams and bigrams are counted on the training text, smoothed in their favour, and see the character "
    "before across sequences too."
)


def run_demo_text(
    output_dir: str | Path = "runs/demo-text",
    seed: int = 0,
    *,
    overrides: Sequence[str] = (),
    draws: int = 8,
    samples: int = 4,
    progress: bool = True,
) -> dict[str, Any]:
    """Train twice, measure, write samples.

    Args:
        output_dir: the demo's own folder. It will hold model/, ar/ (the baseline's run), samples.txt, loss.png,
            metrics.json, recipe.yaml and the trainer's log and last checkpoint.
        seed: of training and samples.
        overrides: of the recipe `text`, for both models.
        draws: of masks a sequence, for the bound.
        samples: how many texts to write with each model.
        progress: draw progress bars, and print samples and a summary at the end.

    Returns:
        What metrics.json holds.

    Raises:
        StorageError: the folder holds something else, or another demo is at work in it.
    """
    started = time.perf_counter()
    run = Path(output_dir)
    usual = [f"name={RUN_NAME}", f"seed={seed}", *overrides]
    recipe, baseline = load_recipe(RECIPE, usual), load_recipe(RECIPE, [*usual, "model.block=[1]"])
    clear_folder(run, RUN_NAME)
    run.mkdir(parents=True, exist_ok=True)
    storage.write_text_atomic(run / "recipe.yaml", recipe_to_yaml(recipe))  # whose folder this is, from the start
    pipelines, seconds = {}, {}
    for name, folder, one in (("blocks", run, recipe), ("ar", run / "ar", baseline)):
        training_started = time.perf_counter()
        pipelines[name] = Trainer(one, folder, progress=progress).train()
        seconds[name] = round(time.perf_counter() - training_started, 1)
    train, held_out = (_text(recipe, split) for split in ("train", "held_out"))
    bounds = {
        name: text_bound(pipeline.transformer, held_out.batches(_BATCH), num_draws=draws, copies=2, seed=seed)
        for name, pipeline in pipelines.items()
    }
    characters = count_characters(held_out.tokenizer, held_out.batches(_BATCH))
    written, speeds = write_samples(pipelines, recipe, seed, samples)
    storage.write_text_atomic(run / "samples.txt", written)
    unigram, bigram = counted_bits(train.row, held_out.row, held_out.vocab_size)
    bits = {name: bound.bits_per_character(characters) for name, bound in bounds.items()}
    metrics = {
        "bits_per_char": bits["blocks"],
        "unigram_bits_per_char": unigram,
        "bigram_bits_per_char": bigram,
        "ar_bits_per_char": bits["ar"],
        "bits_per_char_95": [end / math.log(2) for end in bounds["blocks"].interval],
        "bits_by_place_in_block": [nats / math.log(2) for nats in bounds["blocks"].by_position],
        "characters_per_second": speeds["blocks"],
        "ar_characters_per_second": speeds["ar"],
        "seconds_training": round(sum(seconds.values()), 1),
        "seconds_training_blocks": seconds["blocks"],
        "seconds_training_ar": seconds["ar"],
        "seconds_total": round(time.perf_counter() - started, 1),
        "training_steps": recipe.train.steps,
        "block": recipe.model.block[0],
        "parameters": sum(parameter.numel() for parameter in pipelines["blocks"].transformer.parameters()),
        "characters": characters,
        "seed": seed,
        "protocol": _protocol(held_out, bounds["blocks"], recipe),
        **provenance.facts(),
    }
    metrics["targets"] = {
        "bits_per_char": "< bigram_bits_per_char",
        "met": metrics["bits_per_char"] < metrics["bigram_bits_per_char"],
    }
    storage.write_json_atomic(run / "metrics.json", metrics)
    if progress:
        print(f"{written}\n{summary(metrics, run)}")
    return metrics


def counted_bits(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Bits a token of held-out tokens under counted single tokens, and under counted pairs.

    Args:
        train, held_out: rows of token ids, (M,) each.
        vocab_size: V.
    """
    train, held_out = np.asarray(train, dtype=np.int64), np.asarray(held_out, dtype=np.int64)
    single = np.bincount(train, minlength=vocab_size).astype(np.float64)
    pairs = np.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).astype(np.float64)
    pairs = pairs.reshape(vocab_size, vocab_size)

    def bits(added: float, counts: np.ndarray, *index: np.ndarray) -> float:
        smooth = counts + added
        return float(-np.log2((smooth / smooth.sum(-1, keepdims=True))[index]).mean())

    return (
        min(bits(added, single, held_out) for added in _SMOOTHING),
        min(bits(added, pairs, held_out[:-1], held_out[1:]) for added in _SMOOTHING),
    )


def write_samples(
    pipelines: dict[str, ACDiTTextPipeline], recipe: Recipe, seed: int, samples: int
) -> tuple[str, dict[str, float]]:
    """Texts of both models, from nothing and to the end of the context, not chosen; and characters a second."""
    parts, speeds = [], {}
    titles = {"blocks": f"blocks of {recipe.model.block[0]} characters", "ar": "one character after the other"}
    for name, pipeline in pipelines.items():
        started = time.perf_counter()
        # Some tenths colder than the model's own distribution: small models ramble.
        first = first_sample_seed(seed)
        _, texts = pipeline(batch_size=samples, generator=first, temperature=0.8, return_dict=False)
        speeds[name] = round(sum(map(len, texts)) / (time.perf_counter() - started), 1)
        parts += [f"=== {titles[name]}, sample {index} ===\n{text}\n" for index, text in enumerate(texts)]
    return "\n".join(parts), speeds


def _text(recipe: Recipe, split: str) -> TextDataset:
    """A split of the recipe's text, cut into sequences as they lie."""
    dataset = build_dataset(as_measured(recipe.data, split))
    assert isinstance(dataset, TextDataset)
    return dataset


def _protocol(held_out: TextDataset, bound: TextBound, recipe: Recipe) -> str:
    return _PROTOCOL.format(sequences=len(held_out), context=recipe.data.sequence_length, draws=bound.num_draws)


def summary(metrics: dict[str, Any], run: str | Path) -> str:
    """A few lines for the terminal."""
    low, high = metrics["bits_per_char_95"]
    verdict = "target met" if metrics["targets"]["met"] else "TARGET MISSED"
    return "\n".join(
        [
            f"blocks of {metrics['block']}       ≤ {metrics['bits_per_char']:.3f} bits a character "
            f"(95 % of the draws {low:.3f} … {high:.3f})",
            f"next token        {metrics['ar_bits_per_char']:.3f} (the same size and steps; exact)",
            f"bigrams           {metrics['bigram_bits_per_char']:.3f}, unigrams {metrics['unigram_bits_per_char']:.3f}",
            f"seconds           {metrics['seconds_training']:.0f} training, {metrics['seconds_total']:.0f} in all",
            f"{verdict}; see {Path(run)}/samples.txt, loss.png, metrics.json, model/, ar/",
        ]
    )
