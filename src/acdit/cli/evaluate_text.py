"""acdit evaluate, of a model of text: the bound on a split."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acdit.cli.models import averaging_of, load_text_pipeline
from acdit.cli.parser import positive, refuse_given

if TYPE_CHECKING:
    from acdit.data.text import TextDataset
    from acdit.processes import Processes
    from acdit.recipe import Recipe

OTHERS = (
    "extractor", "weights", "preprocessing", "frames", "frame_stride", "span", "work", "size", "sweep", "self_test"
)  # fmt: skip


def add_text_options(made: argparse.ArgumentParser) -> None:
    """Declare how text is measured; --data, --num-samples (sequences), --batch-size and --seed serve it too."""
    group = made.add_argument_group("models of text (--data RECIPE, behind the model data.key=value)")
    group.add_argument(
        "--estimator", choices=("count", "rate"),
        help="of the bound: count (exact), or rate, the peers' protocol with t ≥ 1e-3 (default count; rate of a model "
        "that is told t)",
    )  # fmt: skip
    group.add_argument("--draws", type=positive, metavar="N", help="draws of masks a sequence (default 8)")
    group.add_argument(
        "--language-model", metavar="DIR", help="of texts (SAMPLES are .txt files, or folders of them): a local GPT-2, "
        "by which their generative perplexity is measured",
    )  # fmt: skip


def require_no_text_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for pictures or clips measured by what only text has."""
    from acdit.errors import ConfigError

    for name in ("estimator", "draws"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}", found="no model of text", expected="a model of text")


def evaluate_text(options: argparse.Namespace) -> None:
    """Perplexity, with its interval and protocol, into the result file."""

    from acdit.processes import joined_processes

    _require_fitting(options)
    with joined_processes() as processes:
        _measure(options, processes)


def _measure(options: argparse.Namespace, processes: Processes) -> None:

    from acdit import provenance, storage
    from acdit.evaluation.perplexity import count_characters, text_bound
    from acdit.model_folder import recipe_to_measure

    started = time.perf_counter()
    options.model, overrides = options.samples[0], [*options.samples[1:], *options.overrides]
    pipeline = load_text_pipeline(options, processes.device(options.device))
    model = pipeline.transformer
    recipe = recipe_to_measure(options.model, options.reference, overrides)
    dataset = _dataset(recipe, pipeline)
    count = min(len(dataset), options.num_samples or len(dataset))
    given = recipe.corruption.first_token_given
    estimator = options.estimator or ("rate" if model.config.time_conditioning else "count")
    bound = text_bound(
        model, dataset.batches(options.batch_size, count), draw=estimator, num_draws=options.draws or 8,
        first_token_given=given, seed=options.seed, processes=processes,
    )  # fmt: skip
    if not processes.is_first:
        return
    characters = count_characters(
        dataset.tokenizer, dataset.batches(options.batch_size, count), first_token_given=given
    )
    figures = {
        "perplexity": bound.perplexity,
        "perplexity_95": list(bound.perplexity_interval),
        "nats_per_token": bound.nats_per_token,
        "nats_per_token_95": list(bound.interval),
        "bits_per_token": bound.nats_per_token / math.log(2),
        "bits_per_character": bound.bits_per_character(characters) if characters else None,
        "nats_per_token_by_block": bound.by_block,
        "nats_per_token_by_place_in_block": bound.by_position,
        "protocol": f"{bound.protocol}; {dataset.protocol}",
        "estimator": estimator,
        "num_draws": bound.num_draws,
        "tokens": bound.tokens,
        "characters": characters,
        "sequences": count,
        "sequences_of_the_split": len(dataset),
        "split": recipe.data.split,
        "data": dataclasses.asdict(recipe.data),
        "bad_files": len(dataset.bad_files),
        "model": options.model,
        "ema": averaging_of(options.model),
        "block": list(model.layout.block),
        "dtype": options.dtype,
        "processes": processes.size,
        "seed": options.seed,
        **provenance.facts(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    output = Path(options.output)
    storage.write_figures(output, figures)
    low, high = bound.perplexity_interval
    print(
        f"perplexity {'' if model.layout.block_tokens == 1 else '≤ '}{bound.perplexity:.4g} "
        f"(95 % of the draws {low:.4g} … {high:.4g}), {figures['bits_per_token']:.4g} bits a token"
        + (f", {figures['bits_per_character']:.4g} a character" if characters else "")
        + f" ({bound.tokens:,} tokens, {bound.num_draws} draws); see {output}"
    )


def _require_fitting(options: argparse.Namespace) -> None:
    from acdit.errors import ConfigError

    refuse_given(options, OTHERS, found="a model of text", expected="pictures or clips")
    wrong = [text for text in options.samples[1:] if "=" not in text]
    if wrong:
        raise ConfigError("SAMPLES", found=wrong[0], expected="one model of text, and data.key=value")


def _dataset(recipe: Recipe, pipeline: Any) -> TextDataset:
    from acdit.codecs import require_vocabulary
    from acdit.data.build import TEXT_KINDS, as_measured, build_dataset
    from acdit.data.text import TextDataset
    from acdit.errors import ConfigError

    tokens = pipeline.transformer.layout.num_tokens
    if recipe.data.kind not in TEXT_KINDS:
        raise ConfigError("data.kind", found=recipe.data.kind, expected=f"one of {', '.join(TEXT_KINDS)}")
    if recipe.data.sequence_length != tokens:
        raise ConfigError(
            "data.sequence_length", found=str(recipe.data.sequence_length), expected=f"{tokens}, the model's context",
            fix=f"add data.sequence_length={tokens}",
        )  # fmt: skip
    dataset = build_dataset(as_measured(recipe.data), tokenizer=pipeline.tokenizer)
    if not isinstance(dataset, TextDataset):
        raise ConfigError(
            "data.streaming", found="true", expected="false: a split is measured whole",
            fix="add data.streaming=false, or data.held_out",
        )  # fmt: skip
    require_vocabulary(dataset.tokenizer, pipeline.transformer.config.vocab_size)
    return dataset
