"""Make the tiny models that come with the package: train from the shipped recipes, round to half precision, measure.

    python benchmarks/builtin_models.py                        # all three, into src/acdit/models
    python benchmarks/builtin_models.py --only text --work runs/builtin

A run that is finished in --work is not run again, a killed one goes on. What is measured are the rounded weights, as
`from_pretrained` gives them, with the demos' own measures. One thread: the figures do not depend on the cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from acdit import ACDiTPipeline, ACDiTTextPipeline, builtin, demo, demo_text, demo_video, provenance, storage
from acdit.data.build import as_measured, build_dataset
from acdit.data.text import TextDataset
from acdit.evaluation.perplexity import count_characters, text_bound
from acdit.hub.folder import forget_places
from acdit.recipe import Recipe, load_recipe
from acdit.training import Trainer
from acdit.videos import open_writer

RECIPES = {"digits": "digits", "moving-digits": "moving-digits-small", "text": "text-small"}
FIRST = {"moving-digits-small": "moving-digits-small-first"}
LIMIT = 3_000_000
"""Bytes of all weights together."""
COMMAND = "python benchmarks/builtin_models.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/builtin"), help="where the runs lie")
    parser.add_argument("--output", type=Path, default=builtin.folder("digits").parents[1], help="src/acdit/models")
    parser.add_argument("--only", nargs="+", choices=builtin.NAMES, default=builtin.NAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    output: Path = options.output.resolve()
    for folder in (options.work, output):
        folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.work)  # so that the recipes name no path of this machine
    for name in options.only:
        metrics = make(name, output / name)
        print(name, {key: metrics[key] for key in list(metrics)[:4]}, flush=True)
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    print(f"{size} bytes of weights together (at most {LIMIT})")
    if size > LIMIT:
        raise SystemExit("too large to ship")


def make(name: str, output: Path) -> dict[str, Any]:
    """Train (or find trained), round, measure, put in place."""
    begin = []
    if first := FIRST.get(RECIPES[name]):
        begin = [f"train.init_from={trained(load_recipe(first))}/model"]
    recipe = load_recipe(RECIPES[name], begin)
    run = trained(recipe)
    with storage.atomic_directory(output) as place:
        pipeline = rounded(run / "model", place / "model", name)
        metrics = {**MEASURES[name](pipeline, recipe), **about(recipe, pipeline)}
        shutil.copyfile(run / "recipe.yaml", place / "recipe.yaml")
        storage.write_figures(place / "metrics.json", metrics)
    return metrics


def trained(recipe: Recipe) -> Path:
    """The run's folder."""
    run = Path(recipe.name)
    if not (run / "model" / "model_index.json").is_file():
        Trainer(recipe, run, resume="latest" if run.exists() else None).train()
    return run


def rounded(source: Path, target: Path, name: str) -> Any:
    """Save with weights in half precision; give back what is loaded from there."""
    kind = ACDiTTextPipeline if name == "text" else ACDiTPipeline
    pipeline = kind.from_pretrained(source)
    pipeline.transformer.half()
    pipeline.save_pretrained(target)
    forget_places(target)
    loaded = kind.from_pretrained(target)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def about(recipe: Recipe, pipeline: Any) -> dict[str, Any]:
    steps = [load_recipe(FIRST[recipe.name]).train.steps] if recipe.name in FIRST else []
    return {
        "recipe": recipe.name,
        "training_steps": [*steps, recipe.train.steps],
        "seed": recipe.seed,
        "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        "weights": "float16 in the file, float32 when loaded; measured so",
        **provenance.facts(),
        "command": COMMAND,
    }


def digits(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    labels = torch.arange(1000) % 10
    figures = demo.measure(demo.draw_samples(pipeline, recipe, labels, 0), labels)
    return {**figures, "num_inference_steps": recipe.sampling.num_inference_steps,
            "guidance_scale": recipe.sampling.guidance_scale}  # fmt: skip


def moving_digits(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    judge, accuracy = demo_video.frame_classifier(recipe)
    labels = torch.arange(200) % 10
    figures = demo_video.measure_clips(demo_video.draw_clips(pipeline, recipe, labels, 0), labels, judge, recipe)
    with tempfile.TemporaryDirectory() as scrap, open_writer(Path(scrap, "stream.gif"), "gif", fps=12) as film:
        stream = demo_video.run_stream(pipeline, recipe, judge, film, Path(scrap, "stream.png"), 0, 200, 20)
    return {
        "frame_accuracy": figures["frame_accuracy"],
        "velocity_error": figures["velocity_error"],
        "stream_frame_accuracy": stream["stream_frame_accuracy"],
        "stream_blocks": stream["stream_blocks"],
        "classifier_accuracy": accuracy,
        "frame_accuracy_by_frame": figures["frame_accuracy_by_frame"],
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "guidance_scale": recipe.sampling.guidance_scale,
        "protocol": "as `acdit demo --video` measures: 200 clips, 20 streams",
    }


def text(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    train, held_out = (build_dataset(as_measured(recipe.data, split)) for split in ("train", "held_out"))
    assert isinstance(train, TextDataset)
    assert isinstance(held_out, TextDataset)
    bound = text_bound(pipeline.transformer, held_out.batches(64), num_draws=8, copies=2, seed=0)
    unigram, bigram = demo_text.counted_bits(train.row, held_out.row, held_out.vocab_size)
    return {
        "bits_per_char": bound.bits_per_character(count_characters(held_out.tokenizer, held_out.batches(64))),
        "unigram_bits_per_char": unigram,
        "bigram_bits_per_char": bigram,
        "protocol": f"as `acdit demo --text` measures: {bound.protocol}",
    }


MEASURES = {"digits": digits, "moving-digits": moving_digits, "text": text}


if __name__ == "__main__":
    main()
