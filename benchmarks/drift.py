"""How streams age: quality block by block, far beyond the trained length, with and without what is meant to help.

    python benchmarks/drift.py                       # everything; the same command goes on after a kill
    python benchmarks/drift.py --demo runs/demo-video        # with the models that the video demo left

Models of the recipe moving-digits, all from one first block (moving-digits-first): with its window; without one; and
the windowed one fine-tuned for some steps more, plainly (the control), with context noise, and with its own blocks as
context. Each streams the same labels and noise. Everything lies in runs/drift; figures and picture go to docs/results/.

Quality is read by the demo's judge, a classifier of single frames: the share of frames whose digit it reads, and the
Fréchet distance of its features between the frames of a block and all frames of held-out clips.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from acdit import provenance, storage
from acdit.analysis.plots import panels
from acdit.data.moving import MovingDigitsDataset, moving_digits
from acdit.demo_video import frame_classifier, speeds
from acdit.evaluation import ClassifierFacts, load_classifier, save_classifier
from acdit.evaluation.frechet import feature_statistics, frechet_distance
from acdit.mask import Window
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe, load_recipe
from acdit.streaming import Stream
from acdit.training import Trainer
from acdit.training.history import committed_checkpoints

RECIPE = "moving-digits"
FIRST_RECIPE = "moving-digits-first"
RESULTS = Path(__file__).parent.parent / "docs" / "results"
FINE_TUNED = {
    "control": [],
    "context noise": ["corruption.context_noise=0.2"],
    "self-context": ["corruption.self_context=0.5"],
}
"""What the windowed model is trained on with, after its end."""
TRAINED_BLOCKS = 4
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as train.steps=100")
    parser.add_argument("--demo", type=Path, help="a video demo's folder (default: its models are trained here)")
    parser.add_argument("--output", type=Path, default=Path("runs/drift"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--streams", type=int, default=100, help="side by side")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the solver, a block (default: the recipe's)")
    parser.add_argument("--fine-tuning", type=int, default=200, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("train", "measure", "draw", "all"), default="all")
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, [f"seed={options.seed}", *options.overrides])
    if options.stage in ("train", "all"):
        train(recipe, options)
    if options.stage in ("measure", "all"):
        measure(recipe, options)
    draw(options)


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    """The models, one after the other; what is finished stays."""
    if options.demo is None:
        run(options.output / "first", options, recipe=FIRST_RECIPE)
        run(options.output / "windowed", options, f"train.init_from={first_model(options)}")
    run(options.output / "unwindowed", options, f"train.init_from={first_model(options)}", "model.window=null")
    tuning = (
        f"train.steps={options.fine_tuning}", f"train.init_from={base_model(options)}", f"seed={options.seed + 1}",
        f"optim.lr={recipe.optim.lr / 4}",
    )  # fmt: skip
    for name, overrides in FINE_TUNED.items():
        run(options.output / name.replace(" ", "-"), options, *tuning, *overrides)


def run(folder: Path, options: argparse.Namespace, *overrides: str, recipe: str = RECIPE) -> None:
    """Train one model, or go on."""
    if (folder / "seconds.json").is_file():
        return
    made = load_recipe(recipe, [f"seed={options.seed}", "train.sample_every=null", *options.overrides, *overrides])
    started = time.perf_counter()
    Trainer(made, folder, resume="latest" if committed_checkpoints(folder) else None).train()
    storage.write_json_atomic(folder / "seconds.json", round(time.perf_counter() - started, 1))


def base_model(options: argparse.Namespace) -> Path:
    """The windowed model."""
    folder: Path = options.output / "windowed" if options.demo is None else options.demo
    return folder / "model"


def first_model(options: argparse.Namespace) -> Path:
    """The model of the first block alone."""
    folder: Path = options.output if options.demo is None else options.demo
    return folder / "first" / "model"


def settings(options: argparse.Namespace) -> dict[str, tuple[Path, Window | None]]:
    """What streams: a model, and the window it streams with (None: its own, or the whole past)."""
    whole = options.output / "unwindowed" / "model"
    return {
        "window": (base_model(options), None),
        "whole past": (whole, None),
        "whole past, streamed with a window": (whole, Window(load_recipe(RECIPE).model.window or 3)),
        **{name: (options.output / name.replace(" ", "-") / "model", None) for name in FINE_TUNED},
    }


def measure(recipe: Recipe, options: argparse.Namespace) -> None:
    """Stream with each model, judge each block; frames are kept, so only what is new is drawn."""
    judge = load_judge(recipe, options.output / "judge.safetensors")
    held_out = frames_of(moving_digits("held_out", recipe.data.frames, size_of(recipe)))
    reference = feature_statistics(judge.features(held_out.flatten(0, 1)))
    result: dict[str, Any] = {}
    labels = torch.arange(options.streams) % CLASSES
    for name, (model, window) in settings(options).items():
        frames, seconds = streamed(name, model, window, recipe, options)
        result[name] = {**judged(frames, labels, judge, reference), "seconds": seconds}
        result[name]["model"] = provenance.weights_sha256(ACDiTPipeline.from_pretrained(model).transformer)
        print(name, {key: value[:: options.blocks // 5] for key, value in result[name].items() if key != "seconds"})
    train_clips = moving_digits("train", recipe.data.frames, size_of(recipe))
    real = torch.stack([train_clips[index][0].transpose(0, 1) for index in range(options.streams)])
    figures = {
        "over_blocks": result,
        "real": judged(real[:, :4], train_clips.labels[: options.streams], judge, reference),
        "trained_blocks": TRAINED_BLOCKS, "streams": options.streams, "blocks": options.blocks,
        "fine_tuning_steps": options.fine_tuning, "fine_tuned_with": FINE_TUNED,
        "num_inference_steps": options.steps or recipe.sampling.num_inference_steps,
        "guidance_scale": recipe.sampling.guidance_scale, "seed": options.seed, "overrides": options.overrides,
        **provenance.facts(),
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(options.results / "drift.json", figures)


def load_judge(recipe: Recipe, path: Path) -> Any:
    """The demo's judge, trained once."""
    if not path.is_file():
        judge, accuracy = frame_classifier(recipe)
        edge = size_of(recipe)
        facts = ClassifierFacts("small", (1, edge, edge), CLASSES, "frames of moving digits", accuracy)
        save_classifier(judge, facts, path)
    return load_classifier(path)[0]


def size_of(recipe: Recipe) -> int:
    """Edge of the canvas."""
    assert isinstance(recipe.data.size, int)
    return recipe.data.size


def frames_of(clips: MovingDigitsDataset) -> Tensor:
    """(M, T, C, H, W) uint8."""
    return torch.stack([clips[index][0].transpose(0, 1) for index in range(len(clips))])


def streamed(
    name: str, model: Path, window: Window | None, recipe: Recipe, options: argparse.Namespace
) -> tuple[Tensor, float]:
    """(M, T, C, H, W) uint8 of as many blocks as asked, and the seconds it took."""
    kept = options.output / "streams" / f"{name.replace(' ', '-').replace(',', '')}.safetensors"
    if kept.is_file():
        held = load_file(kept)
        return held["frames"], float(held["seconds"])
    pipeline = ACDiTPipeline.from_pretrained(model)
    stream = Stream(
        pipeline, (torch.arange(options.streams) % CLASSES).tolist(),
        num_inference_steps=options.steps or recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale, seed=options.seed, window=window, max_blocks=options.blocks,
    )  # fmt: skip
    started = time.perf_counter()
    parts = [
        (frames.clamp(0, 1) * 255).round().to(torch.uint8)
        for frames in tqdm(stream.frames(options.blocks), total=options.blocks, desc=name)
    ]
    seconds = time.perf_counter() - started
    frames = torch.cat(parts, dim=1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_file(kept) as temporary:
        save_file({"frames": frames, "seconds": torch.tensor(seconds)}, temporary)
    return frames, seconds


def judged(frames: Tensor, labels: Tensor, judge: Any, reference: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """Of each block: frames read right, Fréchet distance to held-out frames, mean speed in pixels a frame."""
    accuracy, distance, speed = [], [], []
    for block in frames.split(4, dim=1):
        flat = block.flatten(0, 1)
        accuracy.append(round(judge.accuracy(flat, labels.repeat_interleave(block.shape[1])), 4))
        with torch.no_grad():
            distance.append(round(frechet_distance(*feature_statistics(judge.features(flat)), *reference), 3))
        speed.append(round(float(speeds(block).mean()), 4))
    return {"frame_accuracy": accuracy, "frechet_distance": distance, "speed": speed}


LENGTHS = (1, 2, 4, 8, 12)
"""Stretches of a stream in the table: the first trained length, the second, the fourth, …"""


def stretches(values: list[float], blocks: int) -> list[float]:
    """Means over one trained length after the other."""
    return [sum(values[start : start + blocks]) / blocks for start in range(0, len(values) - blocks + 1, blocks)]


def draw(options: argparse.Namespace) -> None:
    """Accuracy, distance and speed against blocks, each the mean of one trained length; the same as a table."""
    result = json.loads((options.results / "drift.json").read_text(encoding="utf-8"))
    titles = {
        "frame_accuracy": "frames whose digit is read", "frechet_distance": "Fréchet distance to held-out frames",
        "speed": "speed, pixels a frame",
    }  # fmt: skip
    blocks = result["trained_blocks"]
    heading = (
        f"{result['streams']} streams, {result['num_inference_steps']} solver steps a block; means of {blocks} blocks"
    )
    curves: dict[str, dict[str, list[float]]] = {}
    for name, figures in result["over_blocks"].items():
        kept = {metric: figures[metric] for metric in titles}
        # A window of the trained length hides nothing in training: models can be one, and their streams too.
        same = next((other for other, known in curves.items() if known == kept), None)
        if same is not None:
            curves = {f"{key} = {name}" if key == same else key: value for key, value in curves.items()}
        else:
            curves[name] = kept
    with panels(options.results / "drift.png", list(titles.values()), heading) as axes:
        for panel, metric in zip(axes, titles, strict=True):
            for name, figures in curves.items():
                values = stretches(figures[metric], blocks)
                middles = [blocks * place + (blocks + 1) / 2 for place in range(len(values))]
                panel.plot(middles, values, "o-", label=name, linewidth=1.3, markersize=3)
            panel.axhline(result["real"][metric][0], color="#888", linestyle="--", linewidth=1, label="real clips")
            panel.axvline(blocks + 0.5, color="#bbb", linestyle=":", linewidth=1)
            panel.set(xlabel="block", yscale="log" if metric == "frechet_distance" else "linear")
        axes[-1].legend(fontsize=7, frameon=False)
    lengths = [place for place in LENGTHS if place * blocks <= result["blocks"]]
    rows = ["| | stream | " + " | ".join(f"{place} ×" for place in lengths), "|---" * (2 + len(lengths))]
    for metric, title in titles.items():
        places = ".1f" if metric == "frechet_distance" else ".3f"
        for name, figures in curves.items():
            means = stretches(figures[metric], blocks)
            cells = [f"{means[place - 1]:{places}}" for place in lengths]
            rows.append(f"| {title} (real clips: {result['real'][metric][0]:{places}}) | {name} | " + " | ".join(cells))
    storage.write_text_atomic(options.results / "drift.md", "".join(f"{row} |\n" for row in rows))
    print(f"see {options.results}/drift.json, drift.md, drift.png")


if __name__ == "__main__":
    main()
