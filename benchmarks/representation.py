"""What a generative model's features are worth, on MNIST: probes on frozen ones, DiT's beside them, and fine-tuning.

    python benchmarks/representation.py PATH_OF_THE_IDX_FILES          # the same command goes on after a kill

Two models of the recipe mnist-patch4 are trained: ACDiT with its seven blocks, and with one block, which is a plain
diffusion transformer of the same size (DiT). Each gets linear probes on its frozen features: ACDiT's are those of its
clean stream, DiT's those of its noisy stream at a few noise levels, for it has no other; beside them those of ACDiT
before any training, since even random features tell digits apart if there are enough of them. Tokens are averaged over
the whole picture, its 2×2 or 4×4 parts, or not at all (7×7). Then all of ACDiT is fine-tuned (recipe finetune-mnist).
All measure on the test set; which layers, parts and noise level count is chosen on the last 5,000 training pictures,
which no probe of the choice has seen.

Everything lies in runs/representation, figures go to docs/results/representation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from acdit import costs, draws, provenance, storage
from acdit.allocator import keep_freed_memory
from acdit.classifiers import ACDiTClassifier, corruption_of
from acdit.data.build import build_dataset
from acdit.evaluation.classification import measure_accuracy
from acdit.evaluation.intervals import wilson_interval
from acdit.heads import ClassificationHead, Classifier
from acdit.layout import BlockLayout
from acdit.model_folder import overrides_from
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import load_recipe
from acdit.studies.probes import fit, regions, right
from acdit.training import Trainer
from acdit.training.build import architecture, build
from acdit.training.finetune import ClassifierTrainer
from acdit.training.history import committed_checkpoints

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RECIPE = "mnist-patch4"
NOISE_LEVELS = (0, 50, 150)
SIDES = (1, 2, 4, 7)
"""Parts along an edge of the picture, over which tokens are averaged; the last are the tokens themselves."""
WEIGHT_DECAY = 0.5
"""Of the probes. With thousands of features AdamW's usual 1e-4 learns the training pictures by heart."""
HELD_BACK = 5000
AT_ONCE = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of MNIST's four idx files")
    parser.add_argument("overrides", nargs="*", help="of the generative recipe, such as train.steps=100")
    parser.add_argument("--tuning", nargs="*", default=[], metavar="KEY=V", help="overrides of finetune-mnist")
    parser.add_argument("--model", type=Path, help="a trained model of the recipe mnist-patch4 (default: trained here)")
    parser.add_argument("--dit-model", type=Path, help="the same of one block (default: trained here)")
    parser.add_argument("--pictures", type=int, default=60_000, help="training pictures the probes see (default all)")
    parser.add_argument("--probe-steps", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path("runs/representation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    acdit = options.model or generative("acdit", options)
    dit = options.dit_model or generative("dit", options, "model.block=[7,7]", f"train.steps={dit_steps(options)}")
    probes = {"acdit": probe("acdit", acdit, None, options)}
    probes["untrained"] = probe("untrained", untrained(acdit, options), None, options)
    probes |= {f"dit at {level}": probe(f"dit-{level}", dit, float(level), options) for level in NOISE_LEVELS}
    best_dit = max((name for name in probes if name.startswith("dit")), key=lambda name: probes[name]["chosen_on"])
    tuned = finetuned(acdit, options)
    figures = {
        "probe_accuracy": probes["acdit"]["accuracy"],
        "dit_probe_accuracy": probes[best_dit]["accuracy"],
        "untrained_probe_accuracy": probes["untrained"]["accuracy"],
        "dit_noise_timestep": int(best_dit.split()[-1]),
        "finetune_accuracy": tuned["top1"],
        "finetune": tuned,
        "probes": probes,
        "probe_pictures": options.pictures, "probe_steps": options.probe_steps,
        "seeds": [options.seed], "overrides": options.overrides, "tuning": options.tuning,
        **provenance.facts(),
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(options.results / "representation.json", figures)
    print(json.dumps({name: figures[name] for name in figures if name.endswith("accuracy")}))
    print(f"see {options.results / 'representation.json'}")


def dit_steps(options: argparse.Namespace) -> int:
    """Steps of one block that cost what ACDiT's steps cost: it has no clean stream to compute."""
    costs_of = []
    for block in ("[1,7]", "[7,7]"):
        recipe = load_recipe(RECIPE, [*options.overrides, f"model.block={block}"])
        costs_of.append(
            costs.training_flops(architecture(recipe.model), recipe.optim.batch_size, recipe.corruption.copies)
        )
    assert recipe.train.steps is not None
    return round(recipe.train.steps * costs_of[0] / costs_of[1])


def generative(name: str, options: argparse.Namespace, *more: str) -> Path:
    """A model of the recipe, trained or gone on with."""
    folder: Path = options.output / name
    if not (folder / "seconds.json").is_file():
        settings = [f"data.root={options.data}", "train.sample_every=null", f"seed={options.seed}"]
        recipe = load_recipe(RECIPE, [*settings, *options.overrides, *more])
        started = time.perf_counter()
        Trainer(recipe, folder, resume="latest" if committed_checkpoints(folder) else None).train()
        storage.write_json_atomic(folder / "seconds.json", round(time.perf_counter() - started, 1))
    return folder / "model"


def untrained(model: Path, options: argparse.Namespace) -> Path:
    """The same model with the weights that its training began with."""
    folder: Path = options.output / "untrained"
    if not folder.is_dir():
        settings = [f"data.root={options.data}", f"seed={options.seed}"]
        build(load_recipe(RECIPE, [*overrides_from(model), *settings])).pipeline().save_pretrained(folder)
    return folder


def probe(name: str, model: Path, level: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Linear probes of the layers that do best on what is held back, for each number of parts; tested once."""
    kept = options.output / f"probe-{name}.json"
    sha256 = provenance.weights_sha256(ACDiTPipeline.from_pretrained(model).transformer)
    settings = {"model": sha256, "pictures": options.pictures, "steps": options.probe_steps, "seed": options.seed}
    if kept.is_file():
        held = json.loads(kept.read_text(encoding="utf-8"))
        if held["settings"] == settings:
            return dict(held)
    train = features(name, model, level, "train", sha256, options)
    test = features(name, model, level, "test", sha256, options)
    count, total = len(train["labels"]), len(test["labels"])
    shown = count - min(HELD_BACK, count // 5)
    num_layers = len(train) - 1
    every = list(range(num_layers))

    def accuracy(layers: list[int], side: int, seen: int, judged: dict[str, Tensor], start: int = 0) -> float:
        linear = fit(
            joined(train, layers, side)[:seen], train["labels"][:seen], classes=10, steps=options.probe_steps,
            seed=options.seed, weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
        return right(linear, joined(judged, layers, side)[start:], judged["labels"][start:])

    of_parts = {}
    for side in SIDES:
        sets = [[layer] for layer in every]
        if side < max(SIDES):  # tokens of all layers are too many for a small machine's memory
            sets.append(every)
        held_back = {", ".join(map(str, layers)): accuracy(layers, side, shown, train, shown) for layers in sets}
        best = max(held_back, key=lambda layers: held_back[layers])
        found = accuracy([int(layer) for layer in best.split(", ")], side, count, test)
        of_parts[f"{side}x{side}"] = {
            "accuracy": found, "interval": list(wilson_interval(round(found * total), total)), "layers": best,
            "chosen_on": held_back[best], "held_back_accuracy": held_back,
        }  # fmt: skip
        print(f"probe {name}, {side}x{side} parts: {found:.4f} (layers {best})", flush=True)
    chosen = max(of_parts, key=lambda parts: of_parts[parts]["chosen_on"])
    whole = of_parts[chosen]
    result = {
        "accuracy": whole["accuracy"], "interval": whole["interval"], "chosen_on": whole["chosen_on"],
        "parts": chosen, "of_parts": of_parts, "settings": settings,
    }  # fmt: skip
    storage.write_json_atomic(kept, result)
    return result


def joined(features_of: dict[str, Tensor], layers: list[int], side: int) -> Tensor:
    """(M, F): features of some layers side by side, of side × side parts of the picture."""
    parts = [features_of[f"layer-{layer}"].float() for layer in layers]
    return torch.cat([F.adaptive_avg_pool2d(part, side).flatten(1) for part in parts], dim=1)


@torch.no_grad()
def features(
    name: str, model: Path, level: float | None, split: str, sha256: str, options: argparse.Namespace
) -> dict[str, Tensor]:
    """(M, W, 7, 7) of every layer, and the labels, of a split; in half precision, in files that are kept."""
    recipe = load_recipe(RECIPE, [f"data.root={options.data}"])
    dataset: Any = build_dataset(dataclasses.replace(recipe.data, split=split))
    total = min(len(dataset), options.pictures)
    folder = options.output / "features" / f"{name}-{split}-{sha256[:16]}-{options.seed}"
    pipeline = ACDiTPipeline.from_pretrained(model)
    num_layers = len(pipeline.transformer.layers)
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    head = ClassificationHead(width=width, num_classes=10, layers=list(range(num_layers)), noise_timestep=level)
    classifier = ACDiTClassifier(Classifier(pipeline.transformer, head, corruption_of(pipeline.scheduler)), pipeline)
    parts = []
    for start in range(0, total, 5000):
        stop = min(start + 5000, total)
        kept = folder / f"{start:06d}-{stop:06d}.safetensors"
        if not kept.is_file():
            found = []
            for first in range(start, stop, AT_ONCE):
                indices = range(first, min(first + AT_ONCE, stop))
                blocks = classifier.blocks(torch.stack([dataset[index][0] for index in indices]))
                noise = None
                if level is not None:
                    key = {"seed": options.seed, "stream": f"feature noise {split}", "step": 0}
                    noise = draws.normal(tuple(blocks.shape[1:]), samples=indices, **key)
                tokens = classifier.classifier.features(blocks, noise)
                found.append([grid(layer, pipeline.transformer.layout).half() for layer in tokens])
            tensors = {f"layer-{layer}": torch.cat([part[layer] for part in found]) for layer in range(num_layers)}
            tensors["labels"] = torch.tensor([dataset[index][1] for index in range(start, stop)])
            kept.parent.mkdir(parents=True, exist_ok=True)
            with storage.atomic_file(kept) as temporary:
                save_file(tensors, temporary)
            print(f"features {name} {split}: {stop} of {total}", flush=True)
        parts.append(load_file(kept))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def grid(tokens: Tensor, layout: BlockLayout) -> Tensor:
    """(M, N, L, W) → (M, W, 7, 7)."""
    side = max(SIDES)
    return regions(tokens, layout, side).unflatten(2, (side, side)).contiguous()


def finetuned(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of the model fine-tuned, or gone on with; accuracy on the test set, and the seconds that training took."""
    folder: Path = options.output / "finetune"
    settings = [f"data.root={options.data}", f"seed={options.seed}", *options.tuning]
    recipe = load_recipe("finetune-mnist", [*overrides_from(model), *settings])
    seconds = folder / "seconds.json"
    if not seconds.is_file():
        resume = "latest" if committed_checkpoints(folder) else None
        started = time.perf_counter()
        ClassifierTrainer(recipe, folder, resume=resume).train()
        storage.write_json_atomic(
            seconds, {"seconds": round(time.perf_counter() - started, 1), "resumed": bool(resume)}
        )
    dataset = build_dataset(dataclasses.replace(recipe.data, split="test"))
    found = measure_accuracy(ACDiTClassifier.from_pretrained(folder / "model"), dataset, batch_size=AT_ONCE)
    return {**found, **json.loads(seconds.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    main()
