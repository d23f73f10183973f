"""What samplers cost and what their text is worth: first-hitting, ancestral, confidence at several thresholds.

    # RUN: what benchmarks/text_curves.py left
    python benchmarks/text_samplers.py RUN/block-16-seed-0/model --judge RUN/block-1-seed-0/model

Quality is the exact likelihood of the texts under a model with one token a block (the judge), in bits a token, and
the entropy of pairs of neighbouring tokens inside a text: repetition makes a text likely and its entropy small.
Samplers take turns, so that all meet the same machine. Rows of a batch reveal independently, and a step is called while
any row has something to reveal: what parallel reveal saves is seen one text at a time. Figures go to docs/results/.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acdit import provenance, storage
from acdit.evaluation.perplexity import text_bound
from acdit.pipelines_text import ACDiTTextPipeline
from acdit.text_sampling import AncestralSampler, ConfidenceSampler, FirstHittingSampler, Sampler, sample_tokens

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def samplers(block: int, thresholds: Sequence[float]) -> dict[str, Sampler]:
    """What is compared, at a block's length."""
    return {
        "first-hitting": FirstHittingSampler(),
        **{f"ancestral, {steps} steps": AncestralSampler(steps) for steps in (block, 4 * block)},
        **{f"confidence, {threshold:g}": ConfidenceSampler(threshold) for threshold in thresholds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--judge", type=Path, required=True, help="a model of the same tokens with one token a block")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1, help="a step of a batch is one for the slowest text in it")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[1.1, 0.9, 0.6, 0.4, 0.3, 0.2, 0.0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = ACDiTTextPipeline.from_pretrained(options.model).transformer
    judge = ACDiTTextPipeline.from_pretrained(options.judge).transformer
    if judge.layout.block_tokens != 1 or judge.mask_token != model.mask_token:
        raise SystemExit("--judge: expected one token a block and the vocabulary of the model")
    measured = measure(model, samplers(model.layout.block_tokens, options.thresholds), options)
    rows = [{**row, **judged(judge, torch.cat(texts)), "sampler": name} for name, (row, texts) in measured.items()]
    first = rows[0]
    for row in rows:
        row["speed"] = row["tokens_per_second"] / first["tokens_per_second"]
        print(
            f"{row['sampler']:24} {row['calls_per_token']:.3f} calls a token, {row['speed']:.2f} × the speed, "
            f"{row['bits']:.3f} bits, pair entropy {row['pair_entropy']:.3f}"
        )
    options.results.mkdir(parents=True, exist_ok=True)
    storage.write_json_atomic(options.results / "text-samplers.json", {
        "rows": rows, "texts": options.texts, "context": model.layout.num_tokens, "block": model.layout.block_tokens,
        "batch_size": options.batch_size, "temperature": options.temperature, "seed": options.seed,
        **provenance.facts(),
    })  # fmt: skip
    (options.results / "text-samplers.md").write_text(table(rows), encoding="utf-8")


def measure(model: Any, given: dict[str, Sampler], options: argparse.Namespace) -> dict[str, Any]:
    """Texts of each sampler, model calls and seconds: a batch of each in turn."""
    calls: dict[str, int] = dict.fromkeys(given, 0)
    seconds: dict[str, list[float]] = {name: [] for name in given}
    texts: dict[str, list[torch.Tensor]] = {name: [] for name in given}
    for start in range(-options.batch_size, options.texts, options.batch_size):  # the first batch warms up
        for name, sampler in given.items():
            called: list[bool] = []
            started = time.perf_counter()
            made = sample_tokens(
                model, batch_size=options.batch_size, sampler=sampler, temperature=options.temperature,
                generator=options.seed + start + options.batch_size,
                on_step=lambda step, to=called: to.append(step.called_model),
            )  # fmt: skip
            blocks = list(made)
            if start >= 0:
                seconds[name].append(time.perf_counter() - started)
                texts[name].append(torch.cat(blocks, dim=1))
                calls[name] += sum(called)
    tokens = options.batch_size * model.layout.num_tokens
    return {
        name: (
            {
                "calls_per_token": calls[name] * options.batch_size / (len(texts[name]) * tokens),
                "tokens_per_second": tokens / statistics.median(seconds[name]),
            },
            texts[name],
        )
        for name in given
    }


def judged(judge: Any, tokens: torch.Tensor) -> dict[str, float]:
    """Bits a token under the judge, in pieces of its context, and the entropy of pairs inside a text."""
    context = judge.layout.num_tokens
    pieces = tokens[:, : tokens.shape[1] // context * context].reshape(-1, context)
    nats = text_bound(judge, list(pieces.split(32)), num_draws=1).nats_per_token
    entropies = []
    for row in tokens:
        counts = torch.unique(row[:-1] * judge.mask_token + row[1:], return_counts=True)[1].double()
        entropies.append(float(torch.special.entr(counts / counts.sum()).sum()))
    return {"bits": nats / math.log(2), "pair_entropy": statistics.mean(entropies) / math.log(2)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| sampler | model calls a token | tokens/s | × | bits a token, judged | pair entropy, bits |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['sampler']} | {row['calls_per_token']:.3f} | {row['tokens_per_second']:,.0f} | {row['speed']:.2f} | "
        f"{row['bits']:.3f} | {row['pair_entropy']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
