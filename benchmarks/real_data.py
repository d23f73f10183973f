"""A recipe on real data: train it, measure it over the course of training, write pictures and figures.

    python benchmarks/real_data.py mnist PATH_OF_THE_IDX_FILES
    python benchmarks/real_data.py cifar10 PATH_OF_A_ZIP_WITH_train/CLASS/*.png

Everything lies in runs/real-<recipe> and is kept through kills: the same command goes on. What is worth showing goes to
docs/results/. Only the training is timed: its checkpoints are all kept, and measured afterwards.

The Fréchet distance is taken between features of a classifier that is trained here on the real training pictures
(`--extractor classifier`), so it compares with no published FID; as a scale, the same number of held-out real pictures
is measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from acdit import pictures, provenance, storage
from acdit.data.build import build_dataset
from acdit.evaluation import ClassifierFacts, load_classifier, save_classifier, train_classifier
from acdit.evaluation.extractors import ExtractorOptions, build_extractor
from acdit.evaluation.image_sets import open_images, stored_images
from acdit.evaluation.measure import Evaluator
from acdit.evaluation.reference import open_reference
from acdit.generation import SamplingSettings, generate
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from acdit.training import Trainer
from acdit.training.consolidate import consolidate
from acdit.training.history import committed_checkpoints

RESULTS = Path(__file__).parent.parent / "docs" / "results"
HELD_OUT_A_CLASS = 250  # of CIFAR-10's folders, which come without a test split
JUDGES: dict[str, dict[str, Any]] = {
    "mnist": {"network": "small", "epochs": 3, "batch_size": 128, "required_accuracy": 0.985},
    "cifar10": {"network": "residual", "epochs": 12, "batch_size": 128, "learning_rate": 5e-3, "augment": True,
                "required_accuracy": 0.75},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(JUDGES))
    parser.add_argument("data", type=Path, help="the real data")
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as train.steps=100")
    parser.add_argument("--output", type=Path, help="working folder (default runs/real-<recipe>)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where pictures and figures go")
    parser.add_argument("--samples-over-training", type=int, default=1000, help="drawn at each checkpoint")
    parser.add_argument("--samples", type=int, default=2500, help="drawn from the finished model")
    parser.add_argument("--stage", choices=("data", "judge", "train", "measure", "draw", "all"), default="all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work: Path = options.output or Path("runs") / f"real-{options.recipe}"
    work.mkdir(parents=True, exist_ok=True)

    root = options.data if options.recipe == "mnist" else split_zip(options.data, work / "data.zip")
    recipe = load_recipe(options.recipe, [f"data.root={root}", "train.keep_checkpoints=1000", *options.overrides])
    train_images, train_labels = whole_split(recipe, "train", work)
    held_out_images, held_out_labels = whole_split(recipe, "test" if options.recipe == "mnist" else "held_out", work)
    if options.stage == "data":
        return
    if options.stage in ("train", "all"):
        train(recipe, work)
    if options.stage in ("judge", "all"):
        judge(options.recipe, train_images, train_labels, held_out_images, held_out_labels, work)
    if options.stage in ("measure", "all"):
        write(options.recipe, measure(recipe, work, options.samples_over_training, options.samples), options.results)
    if options.stage in ("measure", "draw", "all"):
        draw(options.recipe, work, options.results)


def split_zip(archive: Path, output: Path) -> Path:
    """train/CLASS/*.png → the same with a part of each class in held_out/CLASS, always the same part."""
    if output.is_file():
        return output
    with zipfile.ZipFile(archive) as source, storage.atomic_file(output) as temporary:
        by_class: dict[str, list[str]] = {}
        for name in sorted(entry for entry in source.namelist() if entry.endswith(".png")):
            by_class.setdefault(name.split("/")[-2], []).append(name)
        with zipfile.ZipFile(temporary, "w") as target:
            for label, names in by_class.items():
                order = np.random.default_rng(0).permutation(len(names))
                for place, index in enumerate(order):
                    split = "held_out" if place < HELD_OUT_A_CLASS else "train"
                    target.writestr(f"{split}/{label}/{names[index].split('/')[-1]}", source.read(names[index]))
    return output


def whole_split(recipe: Recipe, split: str, work: Path) -> tuple[Tensor, Tensor]:
    """All pictures (M, C, H, W) uint8 and labels (M,) of a split; kept as ADM's npz, which is the reference later."""
    path = work / f"{split}.npz"
    if not path.is_file():
        changed = recipe_to_dict(recipe)
        changed["data"]["split"] = split
        dataset = build_dataset(recipe_from_dict(changed).data)
        pairs = [dataset[index] for index in range(len(dataset))]
        images = torch.stack([image for image, _ in pairs]).permute(0, 2, 3, 1).numpy()
        with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=images, arr_1=np.array([label for _, label in pairs]))
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays["arr_1"])


def judge(name: str, images: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, work: Path) -> None:
    """Train the classifier that judges, once."""
    path = work / "judge.safetensors"
    if path.is_file():
        return
    started = time.perf_counter()
    classifier, accuracy = train_classifier(images, labels, held_out, held_out_labels, **JUDGES[name])
    shape = (images.shape[1], images.shape[2], images.shape[3])
    told = f"{len(images)} real {name} training pictures"
    facts = ClassifierFacts(JUDGES[name]["network"], shape, int(labels.max()) + 1, told, accuracy)
    save_classifier(classifier, facts, path)
    print(f"judge: {accuracy:.4f} of {len(held_out)} held-out pictures, {time.perf_counter() - started:.0f} s")


def train(recipe: Recipe, work: Path) -> None:
    """Train, or go on; how long it took and where is written beside it."""
    run, told = work / "run", work / "training.json"
    if told.is_file():
        return
    facts = {
        **provenance.facts(),
    }  # fmt: skip
    started = time.perf_counter()
    resume = "latest" if committed_checkpoints(run) else None
    Trainer(recipe, run, resume=resume).train()
    seconds = round(time.perf_counter() - started, 1)
    facts["seconds_training"] = None if resume else seconds  # with pictures and checkpoints on the way
    storage.write_json_atomic(told, facts)
    print(f"trained in {seconds:.0f} s")


def measure(recipe: Recipe, work: Path, over_training: int, final: int) -> dict[str, Any]:
    """Distance and conditional accuracy at every checkpoint, and of the finished model with more samples."""
    weights = work / "judge.safetensors"
    extractor = build_extractor("classifier", ExtractorOptions(str(weights)))
    classifier, _ = load_classifier(weights)
    reference = open_reference(str(work / "train.npz"), extractor.channels)
    evaluator = Evaluator(extractor, reference, work / "features", batch_size=250, chunk_size=1000)
    held_out = next(path for path in (work / "test.npz", work / "held_out.npz") if path.is_file())
    real = open_images(str(held_out), extractor.channels)
    classes = recipe.model.num_classes or 1
    settings = SamplingSettings(
        recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale, 0, tuple(range(classes))
    )
    rows = []
    checkpoints = sorted(committed_checkpoints(work / "run"))
    for step, checkpoint in checkpoints:
        model = work / f"models/{step}"
        if not model.is_dir():
            consolidate(checkpoint, model)
        pipeline = ACDiTPipeline.from_pretrained(model)
        last = step == checkpoints[-1][0]
        count = final if last else over_training
        store = generate(pipeline, settings, work / f"samples/{step}", count, batch_size=100, chunk_size=500)
        drawn = torch.cat([chunk["images"] for chunk in store])
        labels = torch.tensor(settings.labels_of(0, count))
        figures = evaluator.measure(stored_images(store, extractor.channels), over_training)
        rows.append({"step": step, **_kept(figures), "conditional_accuracy": accuracy_of(classifier, drawn, labels)})
        print(json.dumps(rows[-1]))
        if last:
            finished = evaluator.measure(stored_images(store, extractor.channels))
            result = {**_kept(finished), "conditional_accuracy": rows[-1]["conditional_accuracy"]}
    return {
        "recipe": recipe.name,
        "final": result,
        "over_training": rows,
        "real_held_out": {
            str(count): _kept(evaluator.measure(real, count)) for count in (over_training, final) if count <= len(real)
        },
        "extractor": extractor.describe(),
        "reference": reference.describe(),
        "num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale,
        "solver": type(pipeline.scheduler).__name__, "ema": recipe.ema.decays[0], "seed_of_samples": settings.seed,
        "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        "recipe_in_full": recipe_to_dict(recipe),
        "training": json.loads((work / "training.json").read_text(encoding="utf-8")),
        "measured_by": {"command": provenance.command_line(), "commit": provenance.commit()},
    }  # fmt: skip


def accuracy_of(classifier: Any, images: Tensor, labels: Tensor) -> float:
    return round(float(classifier.accuracy(images, labels)), 4)


def _kept(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that a small classifier's features give meaning to."""
    return {
        "frechet_distance": round(figures["fid"], 3), "precision": round(figures["precision"], 4),
        "recall": round(figures["recall"], 4), "num_samples": figures["num_samples"],
    }  # fmt: skip


def write(name: str, result: dict[str, Any], results: Path) -> None:
    """The figures as JSON."""
    result["recipe_in_full"]["data"]["root"] = Path(result["recipe_in_full"]["data"]["root"]).name  # no machine's path
    results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(results / f"{name}.json", result)


def draw(name: str, work: Path, results: Path) -> None:
    """The curves, and the first samples of each class: not chosen, only sorted."""
    result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    step = result["over_training"][-1]["step"]
    first = min((work / f"samples/{step}").glob("items-*"))
    images = torch.cat([load_file(file)["images"] for file in sorted(first.glob("*.safetensors"))])
    classes = result["recipe_in_full"]["model"]["num_classes"]
    columns = 10
    labels = torch.arange(len(images)) % classes
    rows = torch.cat([images[labels == label][:columns] for label in range(classes)])
    names = ACDiTPipeline.from_pretrained(work / f"models/{step}").config.id2label or {}
    pictures.image_grid(rows, columns, row_labels=[names.get(str(label), str(label)) for label in range(classes)]).save(
        results / f"{name}-samples.png"
    )
    _curves(name, result, work / "run" / "log.jsonl", results / f"{name}-curves.png")
    print(f"see {results}/{name}.json, {name}-samples.png, {name}-curves.png")


def _curves(name: str, result: dict[str, Any], log: Path, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [record for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in record]
    rows = result["over_training"]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, distance, accuracy = figure.subplots(1, 3)
    loss.plot([record["step"] for record in losses], [record["loss"] for record in losses], color="#8aa0c0")
    loss.set(title="training loss", yscale="log")
    distance.plot(steps, [row["frechet_distance"] for row in rows], marker="o", color="#d6563c")
    floor = result["real_held_out"].get(str(rows[0]["num_samples"]))
    if floor is not None:
        distance.axhline(floor["frechet_distance"], color="#888", linestyle="--", linewidth=1)
        distance.text(steps[-1], floor["frechet_distance"], "real held-out", ha="right", va="bottom", fontsize=8)
    distance.set(title=f"Fréchet distance, {rows[0]['num_samples']} samples", yscale="log")
    accuracy.plot(steps, [row["conditional_accuracy"] for row in rows], marker="o", color="#d6563c")
    accuracy.set(title="samples recognised as their class", ylim=(0, 1))
    for panel in (loss, distance, accuracy):
        panel.set_xlabel("step")
        panel.grid(True, which="both", color="#e8ebf0", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"recipe {name}; features of a classifier of real {name} pictures", fontsize=9)
    with storage.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    main()
