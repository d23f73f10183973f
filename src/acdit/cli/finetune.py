"""acdit finetune"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from acdit.cli.parser import AddCommand


def add(command: AddCommand) -> None:
    """Declare the command's options."""
    made = command(
        "finetune", _finetune,
        "Teach a trained model to classify: a probe on its frozen features, or all of it.",
        "acdit finetune finetune-digits model=runs/demo/model --output runs/finetune-digits\n"
        "  acdit finetune finetune-mnist model=runs/mnist/model data.root=/data/mnist classification.tune=head",
    )  # fmt: skip
    made.add_argument("recipe", help="a shipped recipe's name (see `acdit recipes`) or a YAML path")
    made.add_argument(
        "overrides", nargs="*", metavar="key.key=value",
        help="change recipe fields; model=PATH takes the model, schedule and pixel scale of a saved pipeline",
    )  # fmt: skip
    made.add_argument("--output", help="the run's directory (default: runs/<recipe's name>)")
    made.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT",
        help="go on exactly where the run stopped; checkpoint-N picks one, default the latest that is whole",
    )  # fmt: skip
    made.add_argument("--allow-inexact", action="store_true", help="resume even without generator states")


def with_model(overrides: list[str]) -> list[str]:
    """Overrides with model=PATH spelled out as what that folder says; later ones still count."""
    spelled: list[str] = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "model" and not value.lstrip().startswith("{"):
            from acdit.model_folder import overrides_from

            spelled = [*overrides_from(value), *spelled]
        else:
            spelled.append(override)
    return spelled


def _finetune(options: argparse.Namespace) -> None:
    from acdit.recipe import load_recipe

    recipe = load_recipe(options.recipe, with_model(options.overrides))  # before torch: a typo answers at once
    from acdit.training.finetune import ClassifierTrainer

    output = Path(options.output or f"runs/{recipe.name}")
    ClassifierTrainer(
        recipe, output, resume=options.resume, allow_inexact=options.allow_inexact, evaluate=evaluation(recipe)
    ).train()
    print(f"done: {output / 'model'} (acdit classify {output / 'model'} PICTURES, acdit evaluate {output / 'model'} …)")


def evaluation(recipe: Any) -> Any:
    """What measures the classifier while it learns; None: nothing."""
    from acdit.data.build import as_measured, build_dataset
    from acdit.evaluation.classification import measure_accuracy

    if recipe.classification is None or recipe.classification.validation_split is None:
        return None
    split = recipe.classification.validation_split
    dataset: Any = build_dataset(as_measured(recipe.data, split))

    def evaluate(classifier: Any, step: int) -> dict[str, float]:
        figures = measure_accuracy(classifier, dataset)
        return {"accuracy": figures["top1"]}

    return evaluate
