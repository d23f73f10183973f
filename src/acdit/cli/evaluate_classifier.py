"""acdit evaluate --classification: how often a classifier is right."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from acdit.cli.classify import load_classifier
from acdit.cli.evaluate_text import OTHERS
from acdit.cli.parser import refuse_given

_OTHERS = (*OTHERS, "estimator", "draws", "language_model", "labels", "solver")


def evaluate_classifier(options: argparse.Namespace) -> None:
    """Top-1 and top-5 with their intervals, into the result file.

    Raises:
        ConfigError: options of samples, no classifier, data it was not made for.
    """
    from acdit import provenance, storage
    from acdit.data.build import as_measured, build_dataset
    from acdit.errors import ConfigError
    from acdit.evaluation.classification import measure_accuracy
    from acdit.model_folder import recipe_to_measure
    from acdit.processes import joined_processes

    refuse_given(options, _OTHERS, found="--classification", expected="one of the two")
    if not options.samples:
        raise ConfigError("SAMPLES", found="nothing", expected="the folder of a model with a classifier/")
    model: str = options.samples[0]
    overrides: list[str] = [*options.samples[1:], *options.overrides]
    started = time.perf_counter()
    with joined_processes() as processes:
        classifier = load_classifier(model, str(processes.device(options.device)), options.vae)
        data = as_measured(recipe_to_measure(model, options.reference, overrides).data)
        dataset: Any = build_dataset(data)
        figures = measure_accuracy(
            classifier, dataset, batch_size=options.batch_size, count=options.num_samples, processes=processes
        )
        if not processes.is_first:
            return
    head = classifier.classifier.head.config
    settings = ("pooling", "layers", "bidirectional", "noise_timestep")
    storage.write_json_atomic(options.output, {
        **figures,
        "classes": len(classifier.class_names),
        "head": {name: head[name] for name in settings},
        "data": dataclasses.asdict(data),
        "model": model,
        "processes": processes.size,
        **provenance.facts(),
        "seconds": round(time.perf_counter() - started, 1),
    })  # fmt: skip
    told = [
        f"{name} {figures[name]:.4f} (95 % {figures[f'{name}_interval'][0]:.4f} … {figures[f'{name}_interval'][1]:.4f})"
        for name in ("top1", "top5")
        if name in figures
    ]
    print(f"{', '.join(told)} on {figures['num_samples']} samples of split {data.split!r}; see {options.output}")
