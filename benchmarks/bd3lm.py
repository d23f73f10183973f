"""Text beside BD3-LMs' own code: speed of a training step, the bound after as many steps, and cached sampling.

    python benchmarks/bd3lm.py --bd3lms PATH_TO_BD3LMS [--data FILE_OR_FOLDER] [--seeds 0 1] [--steps 1000]

PATH_TO_BD3LMS is a checkout of kuleshov-group/bd3lms (see bd3lm_peer.py, which lists what is done to it). It needs what
this project does not; in an environment of its own (torch first, or a bare request for it can pull CUDA):

    python3 -m venv bd3lms-venv
    bd3lms-venv/bin/pip install --constraint constraints.txt torch
    bd3lms-venv/bin/pip install --constraint constraints.txt --editable . \\
        lightning hydra-core omegaconf einops transformers torchmetrics datasets requests

**Training.** Both sides get the same sequences (BOS and characters) at every step, the same AdamW settings and learning
rates, fp32 on a CPU. Steps are interleaved in one process: ours with its two draws of masks, then theirs, the order
turned by one each step. A step of ours includes reading its batch; one of theirs is handed the tokens. No average of
the weights on either side, masks over the whole range of rates, no dropout unless `--dropout` (theirs only: ours has
none; its code draws it even at 0). Each side has its own initialisation, its own draws of t and masks, and the AdamW it
makes itself (ours fused).

**Bound.** Of the same held-out sequences, t on [1e-3, 1], weight 1/t, BOS given: of all models by our estimator, of
theirs by its own `_loss` as well. Beside it our estimator "count" of the same bound, which varies less. That both codes
mean the same is measured too: each token's part of the bound at the same masks.

**Sampling.** One text of `--sample-tokens` from BOS with first-hitting and a cache, of untrained models: one token a
model call on both sides, so the work does not depend on the weights.

What is measured lies in `--output` at once: the same command goes on where it was stopped. Figures and table,
bd3lm.json and bd3lm.md, are written to `--results` at the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bd3lm_measure import load, sample, train
from bd3lm_peer import describe_bd3lms, load_bd3lms
from bd3lm_report import page, targets
from machine import command, say

from acdit import provenance, storage

RESULTS = Path(__file__).parent.parent / "docs" / "results"
OF_BOTH = ("threads", "layers", "width", "heads", "cond_dim")
OF_TRAINING = (
    "dropout", "context", "block", "batch", "steps", "lr", "lr_warmup", "betas", "weight_decay", "untimed", "draws",
)  # fmt: skip
OF_SAMPLING = ("sample_tokens", "repetitions")
"""Settings that a measurement depends on."""


def kept(path: Path, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before with these settings, or now.

    Raises:
        SystemExit: the file holds figures of other settings.
    """
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{path} holds figures of other settings: give a new --output, or remove it")
        return found
    say(f"{path.stem} …")
    started, before = time.perf_counter(), load()
    result = {"settings": settings, "commit": provenance.commit(), "load_average_before": before, **measure()}
    result["seconds_of_all"] = round(time.perf_counter() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(path, result)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bd3lms", type=Path, required=True, help="a checkout of kuleshov-group/bd3lms")
    parser.add_argument("--data", type=Path, help="a text file or a folder with one (default: the built-in text)")
    parser.add_argument("--output", type=Path, default=Path("runs/bd3lm"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    size = parser.add_argument_group("the models")
    size.add_argument("--layers", type=int, default=4)
    size.add_argument("--width", type=int, default=128)
    size.add_argument("--heads", type=int, default=4)
    size.add_argument("--cond-dim", type=int, default=128, help="of theirs (ours: the width)")
    size.add_argument("--dropout", type=float, default=0.0, help="of theirs, whose default is 0.1; ours has none")
    training = parser.add_argument_group("training")
    training.add_argument("--context", type=int, default=256)
    training.add_argument("--block", type=int, default=16)
    training.add_argument("--batch", type=int, default=32)
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--lr", type=float, default=1e-3)
    training.add_argument("--lr-warmup", type=int, default=0, metavar="STEPS", help="theirs is one step behind in it")
    training.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999], help="default: theirs")
    training.add_argument("--weight-decay", type=float, default=0.0)
    training.add_argument("--untimed", type=int, default=10, metavar="STEPS", help="at the beginning, to warm up")
    training.add_argument("--draws", type=int, default=16, help="of masks, for each held-out sequence")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sample-tokens", type=int, default=1024, help="the context too; theirs caches 1024 at most")
    sampling.add_argument("--sample-blocks", type=int, nargs="*", default=[4, 16])
    sampling.add_argument("--repetitions", type=int, default=5, help="texts of each side")
    options = parser.parse_args()
    if options.width % options.heads or options.steps <= options.untimed or options.draws < 2:
        raise SystemExit("--width is a multiple of --heads, --steps more than --untimed, --draws at least 2")
    if options.sample_tokens > 1024 or any(options.sample_tokens % block for block in options.sample_blocks):
        raise SystemExit("--sample-tokens is at most 1024 and a multiple of each of --sample-blocks")
    return options


def main() -> None:
    options = parse()
    load_bd3lms(options.bd3lms)
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in (*OF_BOTH, *OF_TRAINING, *OF_SAMPLING)}
    settings["data"] = "builtin_text" if options.data is None else options.data.name
    known = {"versions": provenance.versions(), "peer": describe_bd3lms(options.bd3lms)}
    result: dict[str, dict[str, Any]] = {"training": {}, "sampling": {}}
    training, sampling = (
        {**{name: settings[name] for name in ("data", *OF_BOTH, *names)}, **known}
        for names in (OF_TRAINING, OF_SAMPLING)
    )
    for seed in options.seeds:
        measure = functools.partial(train, options, seed)
        result["training"][str(seed)] = kept(options.output / f"seed-{seed}.json", training, measure)
    for block in options.sample_blocks:
        measure = functools.partial(sample, options, block)
        result["sampling"][str(block)] = kept(options.output / f"sampling-{block}.json", sampling, measure)
    for part in (*result["training"].values(), *result["sampling"].values()):
        del part["settings"]
    whole = {
        "settings": settings, **known, **result, "targets": targets(result), "command": command("bd3lm.py"),
        "commit": provenance.commit(), "machine": provenance.machine(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(options.results / "bd3lm.json", whole)
    text = page(whole)
    storage.write_text_atomic(options.results / "bd3lm.md", text)
    say(text)


if __name__ == "__main__":
    main()
